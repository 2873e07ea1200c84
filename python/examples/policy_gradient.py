"""Reinforcement learning in which training and generation agree to the bit.

A small model of bytes, with random weights, learns by policy gradient to write vowels. Each round draws samples, then
updates the weights several times on them. In the first update of a round the ratio of new and old probabilities is
exactly 1 for every token: the trainer's forward pass gives the bits that generation gave.

    python examples/policy_gradient.py [--plot FILE]

The plot needs matplotlib.
"""

import argparse

import numpy as np

import segattn

VOWELS = set(b"aeiou")
# Segments of 8 tokens, so that samples run through several of them; some heads read retrieved rows.
KEYS = {
    "model.shape.hidden_size": 64,
    "model.shape.intermediate_size": 128,
    "model.shape.num_hidden_layers": 2,
    "model.shape.num_attention_heads": 4,
    "model.shape.num_key_value_heads": 2,
    "model.shape.vocab_size": 128,
    "model.segment.segment_len": 8,
    "model.segment.prior_len": 4,
    "model.segment.past_len": 4,
    "model.segment.block_len": 4,
    "model.segment.long_range_heads": [1],
    "schedule.lr": 3e-3,
    "schedule.warmup_steps": 0,
    "optimizer.weight_decay": 0.0,
}
PROMPTS = [list(b"Vowels: "), list(b"More: ")]
SAMPLES_A_PROMPT = 16
CLIP = 0.2


def main(rounds: int = 12, updates: int = 3) -> list:
    """Of each round the mean reward, and of each of its updates the ratios of all tokens."""
    trainer = segattn.Trainer(None, KEYS)
    generator = segattn.Generator(trainer)
    history = []
    for number in range(rounds):
        prompts = [prompt for prompt in PROMPTS for _ in range(SAMPLES_A_PROMPT)]
        samples = generator.generate(prompts, max_new=24, seed=number)
        # A token's reward is whether it is a vowel; its advantage is that against the mean.
        scores = np.array([[token in VOWELS for token in sample.tokens] for sample in samples], float)
        steps = [trainer.policy_step(samples, scores - scores.mean(), clip=CLIP) for _ in range(updates)]
        ratios = [np.concatenate(step.ratios(samples)) for step in steps]
        assert (ratios[0] == 1).all(), "training and generation differ"
        history.append((scores.mean(), ratios))
        print(
            f"round {number}: reward {scores.mean():.3f}; ratios: exactly 1 before the first update, "
            f"{ratios[-1].min():.3f} to {ratios[-1].max():.3f} before the last"
        )
    return history


def plot(history: list, path: str) -> None:
    """Rewards by round, and the ratios of each update."""
    import matplotlib
    import matplotlib.ticker

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The same bytes for the same numbers.
    pyplot.rcParams.update({"svg.hashsalt": "segattn", "svg.fonttype": "none", "font.size": 9})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    left.plot([reward for reward, _ in history], marker="o", markersize=3)
    left.set(xlabel="round", ylabel="share of vowels", ylim=(0, 1), title="Mean reward of 32 samples")
    updates = [update for _, ratios in history for update in ratios]
    first = len(history[0][1])
    for color, label, chosen in [
        ("C2", "first update of a round", lambda i: i % first == 0),
        ("C1", "later updates", lambda i: i % first != 0),
    ]:
        at = [i for i in range(len(updates)) if chosen(i)]
        low, high = ([f(updates[i]) for i in at] for f in (np.min, np.max))
        right.vlines(at, low, high, color=color)
        right.plot(at, [np.median(updates[i]) for i in at], ".", color=color, label=label)
    right.axhspan(1 - CLIP, 1 + CLIP, color="0.9", zorder=0, label="not clipped")
    right.set(xlabel="update", ylabel="ratio", yscale="log", title="Ratios of all tokens: range and median")
    right.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    right.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    right.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", metavar="FILE", help="where a plot goes")
    arguments = parser.parse_args()
    done = main()
    if arguments.plot:
        plot(done, arguments.plot)
