"""Generation and training of whole models, by token ids: `Generator`, `Trainer`."""

import json
import math
import os
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Optional, Sequence, Union

import numpy as np

from . import _native
from .errors import ArgumentError


@dataclass(frozen=True)
class Sample:
    """A prompt and how it went on.

    logprobs: natural-log probability of each of `tokens` by the model's own distribution, before temperature and
    penalties. finish: "end token", "length" or "stopped".
    """

    prompt: list
    tokens: list
    logprobs: np.ndarray
    finish: str


@dataclass(frozen=True)
class Step:
    """What a training step did. logprobs: of each sequence's tokens but the first, before the update."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    skipped: Optional[str]
    stop: bool
    logprobs: list

    def ratios(self, samples: Sequence[Sample]) -> list:
        """Of each sample's new tokens: probability in this step by probability when they were drawn."""
        new = [self.logprobs[i][len(sample.prompt) - 1 :] for i, sample in enumerate(samples)]
        return [np.exp(logprobs - sample.logprobs) for logprobs, sample in zip(new, samples)]


class Generator:
    """Continues prompts and scores sequences, by the model in a folder or by that of a `Trainer` as it is now.

    adapter: a folder of adapters for the model in a folder, as `Trainer.save` or PEFT saved it. A trainer's adapters
    go with it.

    On one device the log-probabilities of a token have the same bits in `generate`, in `score` and in the trainer's
    step, whatever else is in the batch.
    """

    def __init__(
        self,
        model: Union[str, os.PathLike, "Trainer"],
        *,
        adapter: Union[str, os.PathLike, None] = None,
        device: str = "cpu",
    ) -> None:
        if not isinstance(model, Trainer):
            folder = None if adapter is None else os.fspath(adapter)
            self._model = _native.Model.open(os.fspath(model), folder, device)
        elif adapter is None:
            self._model = model._model
        else:
            raise ArgumentError("adapter", "none beside a trainer, whose adapters go with it", os.fspath(adapter))

    @property
    def config(self) -> dict:
        """The model's config.json."""
        return json.loads(self._model.config())

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        streams: Optional[Sequence[int]] = None,
        end_tokens: Optional[Sequence[int]] = None,
        breaks: Optional[Sequence[Sequence[int]]] = None,
        rereads: Optional[Sequence[Sequence[int]]] = None,
        segments_per_step: int = 1,
        on_token: Optional[Callable[[int, int, float], bool]] = None,
    ) -> list:
        """A `Sample` for each prompt, at most `max_new` tokens long. All prompts run side by side.

        temperature 0 takes the likeliest token. streams: number of each prompt's random stream; by default how often
        the prompt stands earlier in the list, so that copies of it draw other tokens, and a prompt alone draws the
        same as among others. end_tokens: those of the model by default; an empty list goes on to `max_new`. breaks,
        rereads: positions in each prompt where a segment ends, and where its tokens are read once more
        (docs/contract.md, section 2); those of the model's configuration are added. on_token(prompt, token, logprob)
        hears each token as it comes; where it returns False its sequence ends. Ctrl-C ends the call.
        """
        prompts = [_ids("prompts", prompt) for prompt in prompts]
        if streams is None:
            streams = [prompts[:i].count(prompt) for i, prompt in enumerate(prompts)]
        elif len(streams) != len(prompts):
            raise ArgumentError("streams", f"one for each of {len(prompts)} prompts", str(len(streams)))
        settings = {
            "max_new": max_new,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "end_tokens": None if end_tokens is None else list(end_tokens),
            "segments_per_step": segments_per_step,
        }
        generated = self._model.generate(_marked(prompts, breaks, rereads), list(streams), settings, on_token)
        return [
            Sample(prompt, tokens, np.array(logprobs, np.float32), finish)
            for prompt, (tokens, logprobs, finish) in zip(prompts, generated)
        ]

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        breaks: Optional[Sequence[Sequence[int]]] = None,
        rereads: Optional[Sequence[Sequence[int]]] = None,
        segments_per_step: int = 1,
    ) -> list:
        """Natural-log probabilities of each sequence's tokens but the first, float32.

        breaks, rereads: positions in each sequence, as in `generate`. None is added.
        """
        sequences = [_ids("sequences", sequence) for sequence in sequences]
        scored = self._model.score(_marked(sequences, breaks, rereads), segments_per_step)
        return [np.array(logprobs, np.float32) for logprobs in scored]


class Trainer:
    """A model in training: exact truncated backpropagation through time, AdamW, a schedule, a guard.

    model: a model folder; `None` makes a new one by the keys "model.shape.*", for `vocab_size` token ids. keys: those
    of configs/train.toml by their dotted names, for example {"schedule.lr": 1e-5, "training.tbptt": 1}, or as tables
    in tables. What a run of the command line does besides steps is left to the caller: data, validation, when to save.

    With {"lora": {"r": 16, "alpha": 32.0}} adapters are trained, over the weights of the folder, which stay as they are
    (docs/lora.md).
    """

    def __init__(
        self,
        model: Union[str, os.PathLike, None],
        keys: Optional[Mapping[str, Any]] = None,
        *,
        device: str = "cpu",
        vocab_size: int = 256,
    ) -> None:
        keys = dict(keys or {})
        if model is not None:
            keys["model.folder"] = os.fspath(model)
        self._model = _native.Model.train(_flags(keys), vocab_size, None, device)

    @classmethod
    def resume(
        cls, folder: Union[str, os.PathLike], keys: Optional[Mapping[str, Any]] = None, *, device: str = "cpu"
    ) -> "Trainer":
        """Goes on where the newest whole state that `save` left in the folder ended, to the same bits.

        keys: those to change; of the model and of adapters none but "model.folder", where the weights under adapters
        are now. Other weights under them are refused.
        """
        trainer = cls.__new__(cls)
        trainer._model = _native.Model.train(_flags(dict(keys or {})), 0, os.fspath(folder), device)
        return trainer

    @property
    def config(self) -> dict:
        """The model's config.json."""
        return json.loads(self._model.config())

    def step(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        weights: Optional[Sequence[Sequence[float]]] = None,
        breaks: Optional[Sequence[Sequence[int]]] = None,
        rereads: Optional[Sequence[Sequence[int]]] = None,
    ) -> Step:
        """One update by the mean negative log-probability of all tokens but the first of each sequence.

        weights: how much each token counts, at least 0; one for each token, the first is not used. breaks, rereads:
        positions in each sequence, as in `generate`; none is added. "training.batch" sequences are computed side by
        side.
        """
        sequences = [_ids("sequences", sequence) for sequence in sequences]
        given = [None] * len(sequences) if weights is None else [[float(x) for x in row] for row in weights]
        if len(given) != len(sequences):
            raise ArgumentError("weights", f"one list for each of {len(sequences)} sequences", str(len(given)))
        return self._step(sequences, (breaks, rereads), given, [None] * len(sequences))

    def policy_step(
        self,
        samples: Sequence[Sample],
        advantages: Sequence[Union[float, Sequence[float]]],
        *,
        clip: Union[float, tuple] = 0.2,
        weights: Optional[Sequence[Sequence[float]]] = None,
        breaks: Optional[Sequence[Sequence[int]]] = None,
        rereads: Optional[Sequence[Sequence[int]]] = None,
    ) -> Step:
        """One update by a policy gradient with clipped ratios (docs/contract.md, section 3).

        The loss is the mean over all new tokens of -min(r A, clip(r, 1 - below, 1 + above) A). A is a sample's
        advantage, or one for each of its new tokens; r is the token's probability by its probability when it was
        drawn, `Step.ratios`. Before the first update r is exactly 1 for samples of this device. clip: `below` and
        `above`, or one number for both. weights: of the new tokens, at least 0; 1 by default. breaks, rereads:
        positions in each sample, as in `generate`: those of the model's configuration are added.
        """
        below, above = (clip, clip) if isinstance(clip, (int, float)) else clip
        if len(advantages) != len(samples):
            raise ArgumentError("advantages", f"one for each of {len(samples)} samples", str(len(advantages)))
        if weights is not None and len(weights) != len(samples):
            raise ArgumentError("weights", f"one list for each of {len(samples)} samples", str(len(weights)))
        sequences, all_weights, policies = [], [], []
        for i, sample in enumerate(samples):
            new, unused = len(sample.tokens), [0.0] * len(sample.prompt)
            each = np.broadcast_to(np.asarray(advantages[i], np.float32), (new,)).tolist()
            weight = [1.0] * new if weights is None else [float(x) for x in weights[i]]
            sequences.append([*sample.prompt, *sample.tokens])
            all_weights.append(unused + weight)
            policies.append((unused + sample.logprobs.tolist(), unused + each, (below, above)))
        config = self._model.config()
        own = [_native.prompt_marks(config, len(sample.prompt)) for sample in samples]
        own_breaks, own_rereads = [marks[0] for marks in own], [marks[1] for marks in own]
        marks = _with_own(breaks, own_breaks), _with_own(rereads, own_rereads)
        return self._step(sequences, marks, all_weights, policies)

    def save(self, folder: Union[str, os.PathLike], *, keep: int = 2) -> str:
        """Saves all that `resume` needs; returns a folder in `folder` that is also a model folder.

        Where adapters are trained it is a folder of adapters in PEFT's layout instead. The newest `keep` states stay.
        A state is whole or not there.
        """
        return os.fspath(self._model.save(os.fspath(folder), keep))

    def _step(self, sequences, marks, weights, policies) -> Step:
        given = [
            {"tokens": tokens, "breaks": breaks, "rereads": rereads, "weights": weight, "policy": policy}
            for (tokens, breaks, rereads), weight, policy in zip(_marked(sequences, *marks), weights, policies)
        ]
        *report, logprobs = self._model.step(given)
        return Step(*report, [np.array(row) for row in logprobs])


def _ids(name: str, ids: Sequence[int]) -> list:
    numbers = np.asarray(ids)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise ArgumentError(name, "lists of token ids", f"{numbers.dtype} of shape {numbers.shape}")
    if numbers.size and not 0 <= numbers.min() <= numbers.max() < 2**32:
        raise ArgumentError(name, "token ids from 0 to 2^32 - 1", f"{numbers.min()} to {numbers.max()}")
    return numbers.tolist()


def _with_own(given: Optional[Sequence[Sequence[int]]], own: list) -> Sequence[Sequence[int]]:
    """Positions in each prompt with those that generation has added; one that is there already stays as it is."""
    if given is None:
        return own
    if len(given) != len(own):
        return given  # refused where sequences are counted
    return [
        list(positions) if set(more) <= set(positions) else sorted([*positions, *more])
        for positions, more in zip(given, own)
    ]


def _marked(sequences: list, breaks, rereads) -> list:
    """Each sequence with its breaks and its rereads."""
    for name, positions in (("breaks", breaks), ("rereads", rereads)):
        if positions is not None and len(positions) != len(sequences):
            raise ArgumentError(name, f"one list for each of {len(sequences)} sequences", str(len(positions)))
    none = [[]] * len(sequences)
    columns = zip(sequences, none if breaks is None else breaks, none if rereads is None else rereads)
    return [(ids, list(ends), list(again)) for ids, ends, again in columns]


def _flags(keys: Mapping[str, Any], table: str = "") -> list:
    """Keys as the command line takes them, those of tables by their dotted names."""

    def text(value) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return "none"
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, (list, tuple)):
            return json.dumps(value)
        return str(value)

    flags = []
    for key, value in keys.items():
        flags += _flags(value, f"{table}{key}.") if isinstance(value, Mapping) else [(table + key, text(value))]
    return flags
