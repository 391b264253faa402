"""Train a small model: the Llama that ships in ``quantkit/assets/llama``, or one of another kind like it.

The text is the King James Bible as Debian's ``bible-kjv`` package prints it. Every 19th
chapter is held out; the tokenizer and the models see the others only.

    python examples/train_small_model.py                             # text, tokenizer, Llama, perplexity
    python examples/train_small_model.py --kind qwen2 --out qwen2    # goes on from the Llama: a few minutes
    python examples/train_small_model.py --kind opt --out opt        # its embeddings alone: half an hour
    python examples/train_small_model.py --evaluate                  # only the perplexity of what is there

The other kinds take the bundled tokenizer and, of the bundled Llama, every tensor that fits.
"""

from __future__ import annotations

import itertools
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)
from transformers.utils.logging import disable_progress_bar

from quantkit.evaluate.perplexity import perplexity

ASSETS = Path(__file__).resolve().parents[1] / "quantkit" / "assets"
WINDOW = 512
HELD_OUT_EVERY = 19
CALIBRATION_EVERY = 26
SPECIAL_TOKENS = ["<s>", "</s>", "<pad>"]
# The model is no chat model: the template only has to be a valid one for code that applies it.
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
BOOKS = (
    "Genesis|Exodus|Leviticus|Numbers|Deuteronomy|Joshua|Judges|Ruth|1 Samuel|2 Samuel|1 Kings|"
    "2 Kings|1 Chronicles|2 Chronicles|Ezra|Nehemiah|Esther|Job|Psalms|Proverbs|Ecclesiastes|"
    "Song of Solomon|Isaiah|Jeremiah|Lamentations|Ezekiel|Daniel|Hosea|Joel|Amos|Obadiah|Jonah|"
    "Micah|Nahum|Habakkuk|Zephaniah|Haggai|Zechariah|Malachi|Matthew|Mark|Luke|John|Acts|Romans|"
    "1 Corinthians|2 Corinthians|Galatians|Ephesians|Philippians|Colossians|1 Thessalonians|"
    "2 Thessalonians|1 Timothy|2 Timothy|Titus|Philemon|Hebrews|James|1 Peter|2 Peter|1 John|"
    "2 John|3 John|Jude|Revelation"
)


class Kind(str, Enum):
    """Which decoder: `qwen2` has biases at q, k and v, `qwen3` norms at q and k; `opt` has LayerNorms, biases
    everywhere, learned positions and a ReLU."""

    llama = "llama"
    qwen2 = "qwen2"
    qwen3 = "qwen3"
    opt = "opt"


@dataclass(frozen=True)
class Settings:
    """What a training run is made of."""

    epochs: float
    minutes: float
    batch: int
    matrix_lr: float
    other_lr: float
    weight_decay: float
    dropout: float
    seed: int


# The bundled checkpoint's settings, and what differs for those that go on from it.
DEFAULTS = {
    Kind.llama: {"epochs": 20.0, "minutes": 53.0, "matrix_lr": 5e-3},
    Kind.qwen2: {"epochs": 0.6, "minutes": 15.0, "matrix_lr": 1.5e-3},
    Kind.qwen3: {"epochs": 1.0, "minutes": 20.0, "matrix_lr": 3e-3},
    Kind.opt: {"epochs": 3.0, "minutes": 35.0, "matrix_lr": 5e-3},
}


def read_chapters() -> list[str]:
    """The Bible as one string per chapter: a heading, a blank line, one verse per line."""
    command = ["bible", "-f", "gen1:1-rev22:21"]
    try:
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        typer.echo(f"error: {command[0]}: {error}; install Debian's bible-kjv package", err=True)
        raise typer.Exit(2) from None
    lines = text.splitlines()
    books = iter(BOOKS.split("|"))
    chapters: list[list[str]] = []
    book = abbreviation = chapter = ""
    for line in lines:
        reference, verse = line.split(maxsplit=1)
        if reference.split(":")[0] != chapter:
            chapter = reference.split(":")[0]
            name = chapter.rstrip("0123456789")
            if name != abbreviation:
                abbreviation, book = name, next(books)
            chapters.append([f"{book} {chapter.removeprefix(name)}", ""])
        chapters[-1].append(" ".join(verse.split()))
    return ["\n".join(lines) + "\n\n" for lines in chapters]


def split_chapters(chapters: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out chapters; one in ``HELD_OUT_EVERY`` is held out."""
    middle = HELD_OUT_EVERY // 2
    held_out = chapters[middle::HELD_OUT_EVERY]
    training = [c for i, c in enumerate(chapters) if i % HELD_OUT_EVERY != middle]
    return training, held_out


def train_tokenizer(chapters: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that puts the beginning-of-sequence token first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chapters, trainer)
    bos = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[1],
        pad_token=SPECIAL_TOKENS[2],
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_config(kind: Kind, tokenizer: PreTrainedTokenizerFast) -> PreTrainedConfig:
    """Shapes whose bf16 weights stay about 10,000,000 bytes; grouped-query attention but for OPT."""
    common = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    common |= {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "max_position_embeddings": WINDOW,
        "tie_word_embeddings": True,
    }
    if kind is Kind.opt:
        return OPTConfig(**common, ffn_dim=1024, word_embed_proj_dim=256, dropout=0.0)
    classes = {Kind.llama: LlamaConfig, Kind.qwen2: Qwen2Config, Kind.qwen3: Qwen3Config}
    return classes[kind](**common, intermediate_size=768, num_key_value_heads=2, head_dim=64)


def build_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model with drawn weights that generates greedily."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    ids = {f"{n}_token_id": getattr(config, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    return model


def take_over(model: PreTrainedModel) -> None:
    """The bundled Llama's tensors, where name and shape fit; its embeddings in any case."""
    source = AutoModelForCausalLM.from_pretrained(ASSETS / "llama", dtype=torch.float32)
    own = model.state_dict()
    fitting = {
        name: value
        for name, value in source.state_dict().items()
        if name in own and own[name].shape == value.shape
    }
    model.load_state_dict(fitting, strict=False)
    model.get_input_embeddings().load_state_dict(source.get_input_embeddings().state_dict())


def add_dropout(model: PreTrainedModel, rate: float) -> None:
    """Drop parts of the embeddings and of every branch's output while training.

    Hooks, because Llama has no such dropout of its own and the checkpoint must stay a plain one.
    """

    def hook(module: nn.Module, _: object, output: Tensor | tuple) -> Tensor | tuple:
        if not module.training:
            return output
        if isinstance(output, tuple):
            return (nn.functional.dropout(output[0], rate), *output[1:])
        return nn.functional.dropout(output, rate)

    branches = ("embed_tokens", "self_attn", "mlp", "fc2", "model.norm", "decoder.final_layer_norm")
    for name, module in model.named_modules():
        if name.endswith(branches):
            module.register_forward_hook(hook)


def training_batches(
    chapters: list[Tensor], bos: int, batch: int, rng: random.Random
) -> Iterator[Tensor]:
    """One epoch of windows over whole chapters, in a new order and from a new offset each time.

    Every pass leaps over the chapters with a stride, as the held-out file does: neighbours in a
    window come from the same book, but do not continue each other.
    """
    stride = rng.randrange(HELD_OUT_EVERY - 8, HELD_OUT_EVERY + 9)
    phases = rng.sample(range(stride), stride)
    stream = torch.cat([chapter for phase in phases for chapter in chapters[phase::stride]])
    windows = list(stream[rng.randrange(WINDOW) :].split(WINDOW))[:-1]
    rng.shuffle(windows)
    for start in range(0, len(windows) - batch + 1, batch):
        ids = torch.stack(windows[start : start + batch])
        # A text may begin anywhere: the first token of some windows gives way to <s>.
        ids[torch.rand(batch) < 0.25, 0] = bos
        yield ids


def schedule(progress: float) -> float:
    """Learning-rate factor: a short warm-up, a plateau, then a straight line to zero."""
    return min(1.0, progress / 0.02 + 0.01, max(0.0, (1.0 - progress) / 0.7))


def make_optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the embeddings and the norms."""
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in named if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(
            matrices,
            lr=settings.matrix_lr,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=settings.other_lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights as bf16, in one file."""
    copy = AutoModelForCausalLM.from_config(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(folder)


def train(
    model: PreTrainedModel, chapters: list[Tensor], held_out: Tensor, out: Path, settings: Settings
) -> None:
    """Train within the time limit; the averaged weights are saved after every epoch."""
    rng = random.Random(settings.seed)
    add_dropout(model, settings.dropout)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.98))
    optimizers = make_optimizers(model, settings)
    total = round(sum(map(len, chapters)) // WINDOW // settings.batch * settings.epochs)
    began, step = time.monotonic(), 0

    def progress() -> float:
        return max(step / total, (time.monotonic() - began) / 60 / settings.minutes)

    schedulers = [LambdaLR(o, lambda _: schedule(progress())) for o in optimizers]
    for epoch in itertools.count():
        total_loss, batches = 0.0, 0
        for ids in training_batches(chapters, model.config.bos_token_id, settings.batch, rng):
            if progress() >= 1:
                break
            model.train()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
            average.update_parameters(model)
            total_loss, batches, step = total_loss + loss.item(), batches + 1, step + 1
        save(average.module, out)
        print(
            f"epoch {epoch} step {step} minute {(time.monotonic() - began) / 60:.1f} "
            f"train {total_loss / max(batches, 1):.3f} "
            f"held-out perplexity {perplexity(average.module.eval(), held_out, WINDOW).ppl:.3f}",
            flush=True,
        )
        if progress() >= 1:
            break


def encode(tokenizer: PreTrainedTokenizerFast, text: str, bos: bool) -> Tensor:
    """Token ids of a text, at any length."""
    return torch.tensor(tokenizer(text, add_special_tokens=bos, verbose=False)["input_ids"])


def report(folder: Path, text: str) -> None:
    """Perplexity of a saved checkpoint, and how it goes on from a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = encode(tokenizer, text, True)
    size = (folder / "model.safetensors").stat().st_size
    print(f"{model.num_parameters():,} parameters, {size:,} bytes, {ids.numel():,} tokens")
    print(f"held-out perplexity (bf16): {perplexity(model, ids, WINDOW).ppl:.3f}")
    prompt = tokenizer("In the beginning", return_tensors="pt", return_token_type_ids=False)
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=30)[0]))


def make_texts(training: list[str], held_out: list[str], folder: Path) -> None:
    """The texts that ship with the package: what to calibrate on, what to measure on."""
    folder.mkdir(parents=True, exist_ok=True)
    calibration = training[CALIBRATION_EVERY // 2 :: CALIBRATION_EVERY]
    for name, chapters in {"sample": held_out, "calibration": calibration}.items():
        (folder / f"{name}.txt").write_text("".join(chapters), encoding="utf-8")


def main(
    kind: Annotated[Kind, typer.Option(help="Which decoder.")] = Kind.llama,
    out: Annotated[
        Path,
        typer.Option(help="The checkpoint's folder; for llama one that gets llama/ and texts/."),
    ] = ASSETS,
    evaluate: Annotated[bool, typer.Option("--evaluate", help="Do not train.")] = False,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training text.")] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Time limit; the schedule ends with it.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Windows of 512 tokens per step.")] = 8,
    matrix_lr: Annotated[float | None, typer.Option(help="Learning rate of Muon.")] = None,
    other_lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of the matrices.")] = 0.2,
    dropout: Annotated[float, typer.Option(help="Dropout rate of every branch.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and dropout.")] = 0,
) -> None:
    """Build a small model; for llama its texts and tokenizer too."""
    disable_progress_bar()
    if kind is not Kind.llama and out == ASSETS:
        raise typer.BadParameter("name a folder for this kind", param_hint="--out")
    folder = out / "llama" if kind is Kind.llama else out
    texts = (out if kind is Kind.llama else ASSETS) / "texts"
    if not evaluate:
        training, held_out = split_chapters(read_chapters())
        if kind is Kind.llama:
            tokenizer = train_tokenizer(training, 4096)
            make_texts(training, held_out, texts)
        else:
            tokenizer = AutoTokenizer.from_pretrained(ASSETS / "llama")
        tokenizer.save_pretrained(folder)
        config = build_config(kind, tokenizer)
        config.save_pretrained(folder)
        # transformers may read it as another class beside this config: Qwen2's splits digits.
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = build_model(config, seed)
        if kind is not Kind.llama:
            take_over(model)
        chapters = [encode(tokenizer, chapter, False) for chapter in training]
        sample = encode(tokenizer, "".join(held_out), True)
        print(f"tokens: training {sum(map(len, chapters)):,}, held out {len(sample):,}")
        default = DEFAULTS[kind]
        settings = Settings(
            default["epochs"] if epochs is None else epochs,
            default["minutes"] if minutes is None else minutes,
            batch,
            default["matrix_lr"] if matrix_lr is None else matrix_lr,
            other_lr,
            weight_decay,
            dropout,
            seed,
        )
        train(model, chapters, sample, folder, settings)
    report(folder, (texts / "sample.txt").read_text(encoding="utf-8"))


if __name__ == "__main__":
    typer.run(main)
