"""Renders the templates of this folder with Transformers, for tests/eval/chat_templates.rs to compare with.

    python tests/golden/chat/make.py

needs transformers 5 and jinja2, not torch. The templates are written for this test, in the style of public ones: each
has the constructs that a family of models uses. Writes rendered.json (texts, and bytes of `{% generation %}`),
tokenizer.json and encoded.json (tokens, some with control tokens spelled in messages).
"""

import json
import pathlib

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

HERE = pathlib.Path(__file__).parent
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CONTROLS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]


def conversations():
    return json.loads((HERE / "conversations.json").read_text())


def templates():
    return {path.stem: path.read_text() for path in sorted((HERE / "templates").glob("*.jinja"))}


def normalized(messages):
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def rendered():
    """Of each template on each conversation the text, or what was raised."""
    for template, source in templates().items():
        for conversation, given in conversations().items():
            for prompt in (False, True):
                row = {"template": template, "conversation": conversation, "prompt": prompt}
                try:
                    texts, spans = render_jinja_template(
                        [normalized(given["messages"])],
                        tools=given.get("tools"),
                        documents=given.get("documents"),
                        chat_template=source,
                        return_assistant_tokens_mask=True,
                        add_generation_prompt=prompt,
                        **TOKENS,
                        **given.get("chat_template_kwargs", {}),
                    )
                    text = texts[0]
                    at = lambda i: len(text[:i].encode())
                    row["text"] = text
                    row["generated"] = [[at(start), at(end)] for start, end in spans[0]]
                except Exception as error:
                    row["error"] = str(error)
                yield row


def tokenizer():
    """Byte-level BPE with a few merges and control tokens. The file is made once: training orders ties by chance."""
    path = HERE / "tokenizer.json"
    if not path.exists():
        new = Tokenizer(models.BPE())
        new.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        new.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
        new.train_from_iterator([json.dumps(conversations())] + list(templates().values()), trainer)
        new.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROLS])
        new.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
        new.save(str(path))
    return PreTrainedTokenizerFast(tokenizer_file=str(path), **TOKENS)


def encoded():
    """Tokens: those of control tokens spelled in messages are text where `sanitize_control_tokens` says so."""
    by = tokenizer()
    by.chat_control_tokens = []  # the special ones alone
    for template in ("chatml_tools", "headers", "generation"):
        by.chat_template = templates()[template]
        for conversation, given in conversations().items():
            row = {"template": template, "conversation": conversation}
            more = {key: given.get(key) for key in ("tools", "documents")} | given.get("chat_template_kwargs", {})
            try:
                row["ids"] = by.apply_chat_template(
                    given["messages"], add_generation_prompt=True, sanitize_control_tokens=True, **more
                )["input_ids"]
                if template == "generation" and conversation != "controls":
                    row["mask"] = by.apply_chat_template(
                        given["messages"], add_generation_prompt=True, return_assistant_tokens_mask=True, **more
                    )["assistant_masks"]
            except Exception as error:
                print(template, conversation, error)
                continue
            yield row


def write(name, rows):
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (HERE / name).write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    write("rendered.json", rendered())
    write("encoded.json", encoded())
