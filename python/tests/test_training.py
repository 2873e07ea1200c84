"""Models: generation, scoring and training by token ids."""

import importlib.util
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import segattn
from segattn import Generator, Sample, Trainer

EXAMPLE = Path(__file__).parent.parent / "examples" / "policy_gradient.py"


def example():
    spec = importlib.util.spec_from_file_location("policy_gradient", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KEYS = example().KEYS
TEXT = list(b"to be or not to be, that is the question; whether tis nobler")


def bits(array):
    return np.asarray(array, np.float32).view(np.uint32).tolist()


def test_generation_scoring_and_training_have_the_same_bits():
    trainer = Trainer(None, KEYS)
    generator = Generator(trainer)
    samples = generator.generate([TEXT[:20], TEXT[:3], TEXT[:20]], max_new=30, seed=4)
    assert samples[0].tokens != samples[2].tokens
    whole = [sample.prompt + sample.tokens for sample in samples]
    scored = generator.score(whole, segments_per_step=3)
    step = trainer.step(whole)
    for i, sample in enumerate(samples):
        assert sample.finish == "length" and len(sample.tokens) == 30
        assert bits(sample.logprobs) == bits(scored[i][len(sample.prompt) - 1 :])
        assert bits(scored[i]) == bits(step.logprobs[i])
    for ratios in step.ratios(samples):
        assert (ratios == 1).all()
    # After the update they are others.
    assert bits(generator.score(whole)[0]) != bits(scored[0])


def test_a_prompt_alone_draws_what_it_draws_among_others():
    generator = Generator(Trainer(None, KEYS))
    alone = generator.generate([TEXT[:11]], max_new=12, seed=1)[0]
    among = generator.generate([TEXT, TEXT[:11], TEXT[:5]], max_new=12, seed=1)[1]
    assert alone.tokens == among.tokens and bits(alone.logprobs) == bits(among.logprobs)


def test_training_learns_and_weights_count():
    trainer = Trainer(None, KEYS)
    first = trainer.step([TEXT])
    for _ in range(40):
        last = trainer.step([TEXT])
    assert last.loss < 0.5 * first.loss and last.step == 40
    # Only the last target counts: the loss is its negative log-probability.
    weights = [[0.0] * (len(TEXT) - 1) + [3.0]]
    step = trainer.step([TEXT], weights=weights)
    assert abs(step.loss + step.logprobs[0][-1]) < 1e-6


def test_a_policy_step_is_the_clipped_objective():
    trainer = Trainer(None, KEYS)
    rng = np.random.default_rng(0)
    samples = Generator(trainer).generate([TEXT[:9], TEXT[:2]], max_new=16)
    # As if they had been drawn by another model.
    old = [np.minimum(s.logprobs + rng.normal(0, 0.4, 16).astype(np.float32), 0) for s in samples]
    moved = [Sample(s.prompt, s.tokens, x, s.finish) for s, x in zip(samples, old)]
    advantages = [rng.normal(size=16).astype(np.float32), -0.5]
    step = trainer.policy_step(moved, advantages, clip=(0.2, 0.3))
    expected = []
    for ratio, advantage in zip(step.ratios(moved), advantages):
        expected.append(np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.3) * advantage))
    assert abs(step.loss + np.concatenate(expected).mean()) < 1e-6


def test_a_policy_step_at_ratio_one_is_a_step_weighted_by_the_advantages():
    a, b = (Trainer(None, KEYS) for _ in range(2))
    samples = Generator(a).generate([TEXT[:9]], max_new=16)
    policy = a.policy_step(samples, [2.0], weights=[[0.5] * 16])
    weighted = b.step([samples[0].prompt + samples[0].tokens], weights=[[0.0] * 9 + [0.5] * 16])
    assert abs(policy.grad_norm - 2 * weighted.grad_norm) < 1e-5 * policy.grad_norm


def test_a_run_that_is_resumed_goes_on_to_the_same_bits(tmp_path):
    whole, parted = (Trainer(None, KEYS) for _ in range(2))
    for _ in range(2):
        whole.step([TEXT])
        parted.step([TEXT])
    folder = parted.save(tmp_path)
    assert Path(folder, "model.safetensors").exists()
    resumed = Trainer.resume(tmp_path)
    assert bits(Generator(folder).score([TEXT])[0]) == bits(Generator(resumed).score([TEXT])[0])
    a, b = whole.step([TEXT]), resumed.step([TEXT])
    assert a.step == b.step == 2 and bits(a.logprobs[0]) == bits(b.logprobs[0]) and a.grad_norm == b.grad_norm


def test_breaks_end_segments():
    generator = Generator(Trainer(None, KEYS))
    plain, same = generator.score([TEXT]), generator.score([TEXT], breaks=[[8, 16]])
    other = generator.score([TEXT], breaks=[[5]])
    assert bits(plain[0]) == bits(same[0]) != bits(other[0])
    assert bits(plain[0][:5]) == bits(other[0][:5])


def test_suffixes_are_read_again():
    reread = {"break_after_prompt": True, "prompt_suffix_len": 4, "reread_suffix": 1}
    keys = {**KEYS, **{f"model.segment.{key}": value for key, value in reread.items()}}
    trainer = Trainer(None, keys)
    generator = Generator(trainer)
    samples = generator.generate([TEXT[:41], TEXT[:30]], max_new=12, seed=4)
    whole = [sample.prompt + sample.tokens for sample in samples]
    breaks, rereads = [[37], [26]], [[41], [30]]
    once, twice = generator.score(whole, breaks=breaks), generator.score(whole, breaks=breaks, rereads=rereads)
    for sample, one, two in zip(samples, once, twice):
        new = len(sample.prompt) - 1
        assert bits(sample.logprobs) == bits(two[new:]) != bits(one[new:])
    step = trainer.policy_step(samples, [1.0, -1.0])
    assert all((ratios == 1).all() for ratios in step.ratios(samples))
    # Given positions join the model's own, which may be listed several times.
    keys["model.segment.reread_suffix"] = 2
    trainer = Trainer(None, keys)
    samples = Generator(trainer).generate([TEXT[:41]], max_new=12, breaks=[[10]], rereads=[[15]])
    step = trainer.policy_step(samples, [1.0], breaks=[[10]], rereads=[[15]])
    assert (step.ratios(samples)[0] == 1).all()
    with pytest.raises(segattn.ArgumentError, match="rereads"):
        generator.score(whole, rereads=[[3]])


def test_tokens_are_heard_and_sequences_are_stopped():
    generator, heard = Generator(Trainer(None, KEYS)), []

    def hear(prompt, token, logprob):
        heard.append((prompt, token, logprob))
        return len([x for x in heard if x[0] == prompt]) < 3 + prompt

    samples = generator.generate([TEXT[:4], TEXT[:5]], max_new=9, on_token=hear)
    assert [len(sample.tokens) for sample in samples] == [3, 4]
    assert [sample.finish for sample in samples] == ["stopped", "stopped"]
    assert [token for prompt, token, _ in heard if prompt == 1] == samples[1].tokens

    def fail(*_):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        generator.generate([TEXT], max_new=2, on_token=fail)
    with pytest.raises(segattn.Error, match="in use by another call"):
        generator.generate([TEXT], max_new=2, on_token=lambda *_: generator.score([TEXT]))
    # Both calls left the model usable.
    assert len(generator.generate([TEXT], max_new=2)[0].tokens) == 2


@pytest.mark.parametrize(
    "call, argument, message",
    [
        (lambda t: t.step([[1]]), "batches", "at least two tokens"),
        (lambda t: t.step([TEXT], weights=[[1.0]]), "weights", "one for each of 60 tokens, got 1"),
        (lambda t: t.step([TEXT], weights=[[-1.0] * 60]), "weights", "at least 0"),
        (lambda t: t.step([TEXT], weights=[]), "weights", "one list for each of 1 sequences, got 0"),
        (lambda t: t.step([[1, 2]], breaks=[[3]]), "breaks", "got"),
        (lambda t: t.step([[1, 500]]), "sequences", "ids below 128, got 500"),
        (lambda t: t.step([[500, 1]]), "sequences", "ids below 128, got 500"),
        (lambda t: t.step([[1, -2]]), "sequences", "token ids from 0 to"),
        (lambda t: t.step([[0.5, 2.0]]), "sequences", "lists of token ids, got float64"),
        (lambda t: Generator(t).score([[1, 500]]), "sequences", "ids below 128, got 500"),
        (lambda t: Generator(t).generate([[]], max_new=1), "prompts", "at least one token, got none"),
        (lambda t: Generator(t).generate([[500]], max_new=1), "prompts", "ids below 128, got 500"),
        (lambda t: Generator(t).generate([TEXT], max_new=1, temperature=-1.0), "temperature", "got -1"),
        (lambda t: Generator(t).generate([TEXT], max_new=1, streams=[]), "streams", "1 prompts, got 0"),
        (lambda t: t.policy_step([Sample([1], [2], np.float32([0.5]), "")], [1.0]), "log-probabilities", "at most 0"),
        (lambda t: t.policy_step([Sample([1], [2], np.float32([-1]), "")], [np.inf]), "advantages", "finite"),
        (lambda t: t.policy_step([Sample([1], [2], np.float32([-1]), "")], [1.0], clip=2.0), "clip", "from 0 to 1"),
        (lambda t: t.policy_step([], [1.0]), "advantages", "one for each of 0 samples, got 1"),
    ],
)
def test_a_wrong_argument_is_named(call, argument, message):
    with pytest.raises(segattn.Error, match=message) as caught:
        call(Trainer(None, KEYS))
    assert isinstance(caught.value, segattn.ArgumentError) and caught.value.argument == argument


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Trainer(None, {"schedule.lear": 1.0}), "schedule.lear"),
        (lambda: Trainer(None, {**KEYS, "schedule.lr": -1.0}), "schedule.lr"),
        (lambda: Trainer(None, KEYS, device="tpu"), "device: expected cpu"),
        (lambda: Generator("/nonexistent"), "/nonexistent"),
        (lambda: Trainer.resume("/nonexistent"), "/nonexistent"),
    ],
)
def test_what_cannot_begin_says_why(make, message):
    with pytest.raises(segattn.Error, match=message):
        make()


def test_a_generator_of_a_folder_cannot_train(tmp_path):
    generator = Generator(Trainer(None, KEYS).save(tmp_path))
    with pytest.raises(segattn.ArgumentError, match="model: expected one that is being trained"):
        generator._model.step([])
    assert generator.config["segment"]["segment_len"] == 8


def test_the_example_learns(capsys):
    rewards = [reward for reward, _ in example().main()]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1, rewards
    assert "exactly 1 before the first update" in capsys.readouterr().out


def ctrl_c_in(seconds):
    # A shell starts what runs in its background with the signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_ctrl_c_ends_generation():
    generator = Generator(Trainer(None, KEYS))
    ctrl_c_in(0.2)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        generator.generate([TEXT], max_new=1_000_000, end_tokens=[])
    assert time.monotonic() - started < 5
    assert len(generator.generate([TEXT], max_new=4, end_tokens=[])[0].tokens) == 4


def test_ctrl_c_comes_after_a_whole_training_step():
    trainer, other = Trainer(None, KEYS), Trainer(None, KEYS)
    sequences = 20 * [20 * TEXT]
    ctrl_c_in(0.05)
    with pytest.raises(KeyboardInterrupt):
        trainer.step(sequences)
        # Where the step was done before the signal came.
        time.sleep(5)
    other.step(sequences)
    got, expected = trainer.step([TEXT]), other.step([TEXT])
    assert got.step == expected.step == 1
    assert bits(got.logprobs[0]) == bits(expected.logprobs[0])
