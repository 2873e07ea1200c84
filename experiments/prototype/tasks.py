"""Task text: questions about statements hidden in ordinary text.

Training and tests share no words and no templates. A question is followed by a *break* (the end of a segment), so
that retrieval at the break sees the question's own queries; the answer comes after the break.

Every piece is tokenised by itself and starts and ends at a line's end, so joining ids equals joining text.
"""

import string

import numpy as np

TRAIN_ADJECTIVES = """
    amber brisk copper dusty eager frosty gentle hollow ivory jolly keen lunar mossy nimble olive plain quick
    rusty silver tidy
""".split()
TRAIN_NOUNS = """
    anchor barrel candle dragon engine falcon garden hammer island jacket kettle ladder magnet needle orchard
    pencil quarry rocket saddle tunnel
""".split()
TRAIN_WORDS = """
    apple bridge castle desert eagle forest guitar harbor iceberg jungle kitchen lantern meadow novel ocean
    piano river statue temple valley
""".split()
TEST_ADJECTIVES = """
    wandering curious lazy brave ancient noisy pale clever hidden royal stormy velvet narrow tropical humble
""".split()
TEST_NOUNS = """
    badger cathedral lobster umbrella violin tornado mustard cactus sailor blanket glacier puppet walnut
    compass mirror
""".split()

ANSWER_WEIGHT = 16.0


def digits(rng, n):
    return "".join(rng.choice(list(string.digits), n))


def name(rng, style):
    adjective, noun = rng.choice(TRAIN_ADJECTIVES), rng.choice(TRAIN_NOUNS)
    return f"{adjective}_{noun}_{rng.integers(10, 99)}" if style else f"{adjective} {noun}"


def value(rng):
    if rng.random() < 0.7:
        return digits(rng, rng.integers(4, 9))
    return " ".join(rng.choice(TRAIN_WORDS, 3, replace=False))


RECORDS = [
    ("The code of the {k} is {v}.", "Question: what is the code of the {k}?\nAnswer: the code of the {k} is"),
    ("Note: {k} was filed under {v}.", "Where was {k} filed? Looking it up, {k} was filed under"),
    ("// {k}: ticket {v}", "// Which ticket belongs to {k}? {k}: ticket"),
    ("Remember that the password for {k} reads {v}.", "Recall the password for {k}. It reads"),
]
ENTRIES = [
    ("{k} = {v}", "lookup({k}) returns"),
    ('"{k}": "{v}",', 'The value stored for "{k}" is'),
    ("set {k} to {v};", "get {k} gives"),
]


def group(rng):
    """One group of statements of the same form. Returns [(statements, question, answer)], one for each key."""
    kind = rng.integers(3)
    if kind == 2:  # variable tracking: a chain of copies, asked at its end
        number, length = digits(rng, 5), int(rng.integers(2, 5))
        names = [f"r{x}" for x in rng.choice(900, length, replace=False) + 100]
        chain = [f"Register {names[0]} starts as {number}."]
        chain += [f"Register {b} copies register {a}." for a, b in zip(names, names[1:])]
        asked = names[-1]
        return [(chain, f"What does register {asked} hold? Register {asked} holds", number)]
    statement, question = (RECORDS if kind == 0 else ENTRIES)[rng.integers(4 if kind == 0 else 3)]
    count = int(rng.integers(1, 7))
    keys = []
    while len(keys) < count:
        key = name(rng, kind == 1)
        if key not in keys:
            keys.append(key)
    result = []
    for key in keys:
        v = value(rng)
        result.append(([statement.format(k=key, v=v)], question.format(k=key), v))
    return result


def line_ends(text, ends):
    """Positions in `text` (ids) at which a new line begins. `ends[id]`: the token ends with a newline."""
    return np.flatnonzero(ends[text]) + 1


def training_sequence(rng, text, length, encode, ends, questions=8):
    """Text with statements, questions, breaks and answers.

    Returns ids, the loss weight of each token as a target, and the breaks.
    """
    events = []  # (position, order, ids, ids of the answer if it is a question)
    asked = 0
    while asked < questions:
        items = group(rng)
        targets = rng.permutation(len(items))[: min(len(items), 2)]
        where = {}
        for target in targets:
            at = rng.uniform(0.1, 1.0) * length
            distance = np.exp(rng.uniform(np.log(64), np.log(max(at, 65))))
            where[target] = (at, max(at - distance, 0))
        last = max(at for at, _ in where.values())
        for i, (statements, question, answer) in enumerate(items):
            place = where[i][1] if i in where else rng.uniform(0, last)
            for j, statement in enumerate(statements):
                ids = encode("\n" + statement + "\n")
                events.append((place * (j + 1) / len(statements), len(events), ids, None))
            if i in where:
                events.append((where[i][0], len(events), encode("\n" + question), encode(" " + answer + "\n")))
                asked += 1
    events.sort(key=lambda e: (e[0], e[1]))
    starts = line_ends(text, ends)
    ids, weights, breaks, used, size = [], [], [], 0, 0

    def put(piece, weight):
        nonlocal size
        ids.append(np.asarray(piece, np.uint16))
        weights.append(np.full(len(piece), weight, np.float32))
        size += len(piece)

    for at, _, piece, answer in events:
        upto = used + max(int(at) - size, 0)
        k = np.searchsorted(starts, upto)
        upto = int(starts[k]) if k < len(starts) else upto
        if upto > used:
            put(text[used:upto], 1.0)
            used = upto
        put(piece, 0.0)
        if answer is not None:
            breaks.append(size)
            put(answer, ANSWER_WEIGHT)
    put(text[used : used + max(length - size, 0)], 1.0)
    ids, weights = np.concatenate(ids)[:length], np.concatenate(weights)[:length]
    assert len(ids) == length
    return ids, weights, [b for b in breaks if b < length - 1]


def test_prompt(rng, text, length, encode, ends, keys):
    """A needle prompt in real text: `keys` needles, one of them asked. The prompt ends at `break_at`.

    Returns ids [length], break_at, answer positions (of the seven digits), needle [begin, end) in ids.
    """
    names = []
    while len(names) < keys:
        key = f"{rng.choice(TEST_ADJECTIVES)}-{rng.choice(TEST_NOUNS)}"
        if key not in names:
            names.append(key)
    values = [digits(rng, 7) for _ in names]
    needles = [encode(f"\nOne of the special magic numbers for {k} is: {v}.\n") for k, v in zip(names, values)]
    head = encode("Some special magic numbers are hidden within the following text. Memorize them. "
                  "I will quiz you about the numbers afterwards.\n")
    question = encode(f"\nWhat is the special magic number for {names[0]} mentioned in the provided text? "
                      f"The special magic number for {names[0]} mentioned in the provided text is")
    answer = encode(" " + values[0])
    tail = 16  # positions after the answer, so that every prompt has the same length
    room = length - len(head) - len(question) - tail - sum(map(len, needles))
    starts = line_ends(text[:room], ends)
    if len(starts) < keys:
        starts = np.arange(1, room)
    cuts = np.sort(rng.choice(starts, keys, replace=False))
    order = rng.permutation(keys)
    pieces, size, used, asked = [head], len(head), 0, None
    for cut, which in zip(cuts, order):
        pieces.append(text[used:cut])
        size += cut - used
        used = cut
        if which == 0:
            asked = (size, size + len(needles[0]))
        pieces.append(needles[which])
        size += len(needles[which])
    pieces += [text[used:room], question]
    break_at = size + room - used + len(question)
    pieces += [answer, np.full(tail - len(answer), answer[-1])]
    ids = np.concatenate([np.asarray(p, np.uint16) for p in pieces])
    assert len(ids) == length and break_at == length - tail
    digit_positions = [break_at + i for i, t in enumerate(answer) if i >= len(answer) - 7]
    return ids, break_at, digit_positions, asked
