"""A corpus of six capitals, four sentences each, and ten questions about them."""

from trackstar.corpus import Query

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Peru": "Lima", "Kenya": "Nairobi", "Cuba": "Havana"}
TEXTS = [
    text
    for country, city in CAPITALS.items()
    for text in (
        f"The capital of {country} is {city}.",
        f"{city} lies in {country}, and many people live there.",
        f"Trains to {city}",
        f"In {country} it rains.",
    )
]
QUERIES = [
    *(Query(query_id=f"{c}-1", prompt=f"The capital of {c} is", completion=city) for c, city in CAPITALS.items()),
    *(Query(query_id=f"{c}-2", prompt=f"{city} lies in", completion=c) for c, city in list(CAPITALS.items())[:4]),
]
