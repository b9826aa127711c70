"""Texts that every installation of Python has: to calibrate on, and to measure quality on."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings

import numpy as np

MODULES = """
    argparse ast asyncio base64 bisect calendar collections concurrent.futures configparser
    contextlib copy csv datetime decimal difflib dis email.message fractions functools ftplib gzip
    hashlib heapq html http.client http.cookiejar imaplib inspect io ipaddress itertools json locale
    logging mailbox math multiprocessing netrc numbers operator optparse os pathlib pickle platform
    plistlib poplib pprint queue random re sched secrets selectors shelve shlex shutil smtplib
    socket sqlite3 ssl statistics string struct subprocess sys tarfile tempfile textwrap threading
    time timeit tokenize trace turtle types typing unicodedata unittest unittest.mock urllib.parse
    urllib.request uuid warnings wave weakref webbrowser xml.dom.minidom xml.etree.ElementTree
    zipfile zlib numpy numpy.linalg numpy.random numpy.fft scipy.stats scipy.signal scipy.ndimage
    scipy.optimize
"""


def topics() -> list[str]:
    """Return the paragraphs of prose in Python's manual, of ``pydoc_data.topics``."""
    from pydoc_data.topics import topics as manual

    found = []
    for name in sorted(manual):
        for paragraph in re.split(r"\n\s*\n", manual[name]):
            text = " ".join(paragraph.split())
            letters = sum(c.isalpha() or c == " " for c in text)
            if len(text) > 30 and letters > 0.8 * len(text):
                found.append(text)
    return list(dict.fromkeys(found))


def calibration(n: int, seed: int = 1, shortest: int = 121) -> list[str]:
    """Return n paragraphs of :func:`topics`, drawn of those with ``shortest`` letters or more."""
    found = [text for text in topics() if len(text) >= shortest]
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[i] for i in order[:n]]


def docstrings() -> list[tuple[str, str]]:
    """Return the first sentence and the rest of what Python, NumPy and SciPy say of their objects.

    Modules that are not there are left out: the texts are those of the installed versions.
    """
    found: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is deprecated, and only read here
        for name in MODULES.split():
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
            for key, thing in sorted(vars(module).items()):
                if key.startswith("_") or not callable(thing):
                    continue
                parts = re.split(r"\n\s*\n", inspect.getdoc(thing) or "", maxsplit=1)
                head, *rest = (" ".join(part.split()) for part in parts)
                if rest and 20 < len(head) < 160 and len(rest[0]) > 80 and "(" not in head:
                    found.setdefault(head, rest[0][:600])
    return [*found.items()]


def evaluation(n: int = 150, seed: int = 0) -> list[tuple[str, str]]:
    """Return n of :func:`docstrings`, drawn."""
    found = docstrings()
    drawn = np.random.default_rng(seed).choice(len(found), min(n, len(found)), replace=False)
    return [found[i] for i in drawn]


def general() -> list[str]:
    """Return 60 sentences that are not about programming: of each three, two mean the same."""
    return [sentence for triple in TRIPLES for sentence in triple]


def shuffled(texts: list[str], generator: np.random.Generator) -> list[str]:
    """Return texts in an order that is drawn."""
    return [texts[i] for i in generator.permutation(len(texts))]


TRIPLES = (
    (
        "A man is playing a guitar on the street.",
        "Someone performs music with a guitar outdoors.",
        "The committee postponed its decision until spring.",
    ),
    (
        "The cat is sleeping on the warm windowsill.",
        "A cat naps in the sun beside the window.",
        "Two cyclists crossed the finish line together.",
    ),
    (
        "She bakes fresh bread every Sunday morning.",
        "Each Sunday she makes a loaf in the oven.",
        "The bridge was closed after the flood.",
    ),
    (
        "Heavy rain delayed the train to the coast.",
        "Because of the storm the train to the sea was late.",
        "He collects stamps from South America.",
    ),
    (
        "The doctor told him to rest for a week.",
        "On medical advice he stayed in bed for seven days.",
        "A new museum opened beside the harbour.",
    ),
    (
        "Children are building a castle of sand at the beach.",
        "Kids shape a fortress out of sand by the sea.",
        "The price of coffee rose again this month.",
    ),
    (
        "The team won the final by a single goal.",
        "With one goal more the players took the cup.",
        "My grandmother grows roses behind her house.",
    ),
    (
        "An old oak fell across the road in the night.",
        "During the night a large tree came down and blocked the street.",
        "The choir rehearses on Thursdays.",
    ),
    (
        "He forgot his keys and could not get into the flat.",
        "Without his keys he was locked out of his home.",
        "Whales travel thousands of miles each year.",
    ),
    (
        "The river is too cold for swimming in March.",
        "Nobody bathes in the stream in early spring, for the water is icy.",
        "The orchestra tuned its instruments.",
    ),
    (
        "The company will hire fifty engineers this year.",
        "Fifty new engineering jobs are planned at the firm.",
        "A fox ran through the garden at dawn.",
    ),
    (
        "Our flight to Rome leaves at six in the evening.",
        "The plane to Italy's capital takes off at 6 p.m.",
        "Mix the flour with butter and a pinch of salt.",
    ),
    (
        "The professor explained how stars are born.",
        "In her lecture the scientist described the formation of stars.",
        "The shop on the corner sells used bicycles.",
    ),
    (
        "Farmers fear that the drought will ruin the harvest.",
        "The lack of rain worries those who grow the crops.",
        "She painted the kitchen walls yellow.",
    ),
    (
        "The film was long, but the ending was wonderful.",
        "Although the movie dragged on, its last scenes were great.",
        "Parking is forbidden in front of the station.",
    ),
    (
        "A dog is chasing a ball across the park.",
        "In the park a puppy runs after a ball.",
        "The court rejected the appeal.",
    ),
    (
        "He speaks four languages without an accent.",
        "His command of four tongues is that of a native.",
        "The soup needs more pepper.",
    ),
    (
        "The mayor promised to build more cycle paths.",
        "More lanes for bicycles were announced by the head of the city.",
        "Penguins keep their eggs warm on their feet.",
    ),
    (
        "Sales of electric cars doubled within a year.",
        "Twice as many battery-powered vehicles were sold as the year before.",
        "The violin was made three centuries ago.",
    ),
    (
        "The hikers reached the summit just before sunset.",
        "Shortly before dark the walkers stood on top of the mountain.",
        "The bank changed its opening hours.",
    ),
)
