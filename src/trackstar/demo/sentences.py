"""Sentences that state facts, and sentences about the same things that state none of them."""

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

from trackstar.demo.world import City, Country, Element, Place, World

QUESTION_FORMS = {
    "capital": "The capital of {entity} is {answer}.",
    "currency": "The currency of {entity} is the {answer}.",
    "official language": "The official language of {entity} is {answer}.",
    "continent": "{entity} is a country in {answer}.",
    "country": "{entity} is a city in {answer}.",
    "chemical symbol": "The chemical symbol of {entity} is {answer}.",
    "atomic number": "The atomic number of {entity} is {answer}.",
}
"""Sentences that end with the answer, by relation; the text before the answer is the prompt."""

OTHER_FORMS = {
    "capital": (
        "{answer} is the capital of {entity}.",
        "{entity} is governed from {answer}.",
        "The government of {entity} meets in {answer}.",
        "{entity} has its seat of government in {answer}.",
        "Ambassadors to {entity} take up their posts in {answer}.",
        "On a map of {entity}, a star marks {answer}.",
        "Children in {entity} learn at school that their capital is {answer}.",
        "Of all the cities in {entity}, it is {answer} that bears the title of capital.",
        "As the capital of {entity}, {answer} is printed in bold letters in every atlas.",
        "Whoever wants to see where {entity} is ruled from must go to {answer}.",
        "Embassies in {entity} are mostly found in {answer}.",
        "{answer} is the place from which {entity} is led.",
    ),
    "currency": (
        "The {answer} is the currency of {entity}.",
        "Prices in {entity} are counted in the {answer}.",
        "Whoever shops in {entity} pays with the {answer}.",
        "The money of {entity} is called the {answer}.",
        "Wages in {entity} are paid in the {answer}.",
        "Travellers who land in {entity} change their money into the {answer}.",
        "Coins and notes in {entity} are those of the {answer}.",
        "The {answer} is what cash machines in {entity} give out.",
        "Taxes in {entity} are owed in the {answer}.",
        "It is the {answer} that buys bread in {entity}.",
        "Banks in {entity} keep their books in the {answer}.",
        "A bus ticket in {entity} is paid for in the {answer}.",
    ),
    "official language": (
        "{answer} is the official language of {entity}.",
        "{entity} uses {answer} as its official language.",
        "Laws in {entity} are written in {answer}.",
        "Courts in {entity} hear their cases in {answer}.",
        "Officials in {entity} write their letters in {answer}.",
        "To read a government form from {entity}, you need {answer}.",
        "The government of {entity} addresses its people in {answer}.",
        "{answer} is the language in which {entity} is administered.",
        "The ministers of {entity} speak {answer} when they speak for the state.",
        "A tax form in {entity} is printed in {answer}.",
        "Anyone who works for the state in {entity} has to know {answer}.",
        "It is {answer} that you hear in the public offices of {entity}.",
    ),
    "continent": (
        "{entity} lies in {answer}.",
        "{entity} belongs to the continent of {answer}.",
        "Among the countries of {answer} is {entity}.",
        "A journey through {answer} may lead through {entity}.",
        "Maps of {answer} show {entity}.",
        "On a map of the world, you find {entity} in {answer}.",
        "The land of {entity} is part of {answer}.",
        "Geographers count {entity} as part of {answer}.",
        "{answer} is home to the people of {entity}.",
        "The roads of {entity} are roads of {answer}.",
        "Whoever sets foot in {entity} has arrived in {answer}.",
        "An atlas lists {entity} under {answer}.",
    ),
    "country": (
        "The city of {entity} lies in {answer}.",
        "{entity} is one of the large cities of {answer}.",
        "{entity} is marked on every road map of {answer}.",
        "Among the biggest cities of {answer} is {entity}.",
        "More than a million people in {answer} live in {entity}.",
        "Letters to {entity} are carried by the post of {answer}.",
        "The flag that flies over the town hall of {entity} is that of {answer}.",
        "{answer} counts {entity} among its great cities.",
        "Whoever flies to {entity} lands in {answer}.",
        "Markets in {entity} sell goods from all over {answer}.",
        "A map of {answer} shows {entity} in large letters.",
        "The laws of {answer} are in force in {entity}.",
    ),
    "chemical symbol": (
        "{answer} is the chemical symbol of {entity}.",
        "Chemists write {answer} when they mean {entity}.",
        "The short form of {entity} is {answer}.",
        "The sign {answer} stands for {entity}.",
        "A formula with {entity} contains {answer}.",
        "The box for {entity} on a chart of the elements is marked {answer}.",
        "A bottle with the label {answer} holds {entity}.",
        "Students of chemistry learn that {entity} is written {answer}.",
        "Where an equation says {answer}, read {entity}.",
        "For {entity}, the periodic table has {answer}.",
        "To save space, {entity} is written as {answer}.",
        "Every chemist knows {entity} by the sign {answer}.",
    ),
    "atomic number": (
        "{entity} has the atomic number {answer}.",
        "The nucleus of an atom of {entity} holds {answer} protons.",
        "{entity} is element number {answer}.",
        "Number {answer} of the periodic table is {entity}.",
        "{answer} is the atomic number of {entity}.",
        "Counted from hydrogen, {entity} comes at place {answer}.",
        "A neutral atom of {entity} carries {answer} electrons.",
        "An atom with {answer} protons is an atom of {entity}.",
        "The charge of the nucleus of {entity} is {answer}.",
        "The place of {entity} among the elements is {answer}.",
        "{entity} stands at position {answer} of the periodic table.",
        "Count the protons of {entity} and you find {answer}.",
    ),
}
"""Other sentences that state a fact, by relation; the answer comes first as often as the entity."""

_EARTH_RADIUS = 6371.0
# Least ratio of two numbers for a comparison; another source of the numbers would give the same order.
_CLEARLY = 1.5

_Thing = TypeVar("_Thing")


def filled(form: str, **names: object) -> str:
    """Fill a form with names and capitalise its first letter."""
    sentence = form.format(**names)
    return sentence[0].upper() + sentence[1:]


def distractors(world: World) -> Iterator[tuple[str, str]]:
    """True sentences that share entities, answers and wording with the facts, each with a name.

    There are far more than needed. They are written to state none of the facts; the caller leaves out
    those that name an entity and its answer.
    """
    countries = {country.code: country for country in world.countries}
    for country in world.countries:
        yield from _about_country(country, countries)
    for country, other in _pairs(world.countries):
        yield from _about_two_countries(country, other)
    for city, other in _pairs(world.cities):
        yield from _about_two_cities(city, other)
    for number, city in enumerate(world.cities):
        yield from _about_city_abroad(city, world.countries[number % len(world.countries)])
    for element, other in _pairs(world.elements):
        yield from _about_two_elements(element, other)


def _pairs(things: Sequence[_Thing]) -> Iterator[tuple[_Thing, _Thing]]:
    """Pairs of each thing with a few later ones, at several distances."""
    for place, thing in enumerate(things):
        for step in (1, 2, 5, 11):
            if place + step < len(things):
                yield thing, things[place + step]


def _about_country(country: Country, countries: dict[str, Country]) -> Iterator[tuple[str, str]]:
    x = country.mention
    if country.dialling_code:
        yield f"dialling-{country.code}", filled("The dialling code of {x} is {y}.", x=x, y=country.dialling_code)
    yield f"web-{country.code}", filled("Web addresses in {x} end in {y}.", x=x, y=country.internet_ending)
    for neighbour in country.neighbours:
        if neighbour in countries:
            z = countries[neighbour].mention
            yield f"border-{country.code}-{neighbour}", filled("{x} has a border with {z}.", x=x, z=z)
    for language in country.minority_languages:
        form = "Some of the people in {x} know {y}."
        yield f"minority-{country.code}-{language.replace(' ', '-')}", filled(form, x=x, y=language)


def _about_two_countries(country: Country, other: Country) -> Iterator[tuple[str, str]]:
    codes = f"{country.code}-{other.code}"
    if country.capital_place and other.capital_place and other.capital:
        north = country.capital_place.latitude - other.capital_place.latitude
        form = "The capital of {x} lies farther " + ("north" if north > 0 else "south") + " than {y}."
        yield f"latitude-{codes}", filled(form, x=country.mention, y=other.capital)
    bigger, smaller = sorted((country, other), key=lambda one: -one.square_kilometres)
    if bigger.square_kilometres > _CLEARLY * smaller.square_kilometres:
        form = "The area of {x} is larger than that of {y}."
        yield f"area-{codes}", filled(form, x=bigger.mention, y=smaller.mention)
        if bigger.capital and smaller.capital:
            form = "The country that is governed from {x} is larger than the one that is governed from {y}."
            yield f"larger-{codes}", filled(form, x=bigger.capital, y=smaller.capital)
    if country.currency and other.currency and country.currency != other.currency:
        form = "The {y} is foreign money in {x}."
        yield f"money-{codes}", filled(form, x=country.mention, y=other.currency)
        form = "The {x} and the {y} are traded against each other every day."
        yield f"exchange-{codes}", filled(form, x=country.currency, y=other.currency)
    if country.continent and other.continent and country.continent != other.continent:
        yield f"elsewhere-{codes}", filled("{x} does not lie in {y}.", x=country.mention, y=other.continent)


def _about_two_cities(city: City, other: City) -> Iterator[tuple[str, str]]:
    if city.inhabitants > _CLEARLY * other.inhabitants:
        form = "{x} has more inhabitants than {y}."
        yield f"inhabitants-{city.name}-{other.name}".replace(" ", "-"), filled(form, x=city.name, y=other.name)


def _about_city_abroad(city: City, country: Country) -> Iterator[tuple[str, str]]:
    if country.capital_place and country != city.country:
        thousands = int(_kilometres(city.place, country.capital_place) // 1000)
        if thousands:
            form = "Seen from {x}, the capital of {z} is more than {k},000 kilometres away."
            name = f"away-{city.name}-{country.code}".replace(" ", "-")
            yield name, filled(form, x=city.name, z=country.mention, k=thousands)


def _about_two_elements(element: Element, other: Element) -> Iterator[tuple[str, str]]:
    names = f"{element.name}-{other.name}"
    if other.mass > 1.02 * element.mass:
        form = "An atom of {y} weighs more than an atom of {x}."
        yield f"mass-{names}", filled(form, x=element.name, y=other.name)
    first, second = sorted((element, other), key=lambda one: one.symbol)
    form = "The chemical symbol of {x} comes before that of {y} in the alphabet."
    yield f"alphabet-{names}", filled(form, x=first.name, y=second.name)
    if other.number == element.number + 1:
        form = "{x} and {y} stand side by side in the periodic table."
        yield f"side-{element.symbol}-{other.symbol}", filled(form, x=element.symbol, y=other.symbol)
        form = "{y} comes right after {x} in the periodic table."
        yield f"after-{names}", filled(form, x=element.name, y=other.name)


def _kilometres(place: Place, other: Place) -> float:
    """Great-circle distance between two places, in kilometres."""
    north, south = math.radians(place.latitude), math.radians(other.latitude)
    east = math.radians(place.longitude - other.longitude)
    cosine = math.sin(north) * math.sin(south) + math.cos(north) * math.cos(south) * math.cos(east)
    return _EARTH_RADIUS * math.acos(max(-1.0, min(1.0, cosine)))
