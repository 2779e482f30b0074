"""T5 as a text encoder and as a caption decoder, with tiny ones made here in both ways that hubs hold them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import sentencepiece
import synthetic
import torch
import torch.nn.functional as F
from conftest import RunSvb
from runs import Task
from safetensors.torch import save_file
from test_decoder import MEMORY_SIZE, logits_of, make_memory
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from svb.data.caption_features import read_caption_features
from svb.data.t5 import load_t5_encoder, load_t5_with_decoder
from svb.errors import InputError, MismatchError, ModelUnavailableError, UsageError
from svb.extract.text_encoders import load_text_encoder
from svb.extract.text_encoders.t5 import LENGTHS
from svb.extract.text_encoders.text_encoder import TextEncoder
from svb.train.checkpoint import load_checkpoint
from svb.train.config import TrainConfig
from svb.train.decoders.t5 import MAX_TOKENS, T5Decoder
from svb.train.run import read_run, train

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
QUICK = TrainConfig(embedding_size=32, batch_size=16, epochs=1, rebuild="tokens")
CAPTIONS = ["a dog runs", "a dog sleeps", "two cats play on a bed", "the cat sleeps"]
CAPTIONS += ["a red ball flies over a house"]
SIZES: dict[str, Any] = {
    **{"vocab_size": 160, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "decoder_start_token_id": 0,
}


def save_tied(folder: Path) -> Path:
    """Write a T5 as `t5-base` is held: tied output, safetensors, and here a sentencepiece vocabulary alone."""
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**SIZES)).save_pretrained(folder)
    ids = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    options = {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2, **ids}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 3), model_prefix=str(folder / "spiece"), **options
    )
    return folder


def save_untied(folder: Path) -> Path:
    """Write a T5 as `google/t5-v1_1-base` is held: an output of its own, a gated layer, weights of PyTorch."""
    torch.manual_seed(1)
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    network = T5ForConditionalGeneration(T5Config(**SIZES, **gated))
    network.lm_head.weight = torch.nn.Parameter(torch.randn(160, 32) * 0.2)
    folder.mkdir()
    torch.save(network.state_dict(), folder / "pytorch_model.bin")
    kind = {"model_type": "t5", "is_encoder_decoder": True, "pad_token_id": 0, "eos_token_id": 1}
    (folder / "config.json").write_text(json.dumps({**SIZES, **gated, **kind}))
    words = sorted({word for caption in CAPTIONS for word in caption.split()})
    tokens = {word: token for token, word in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tied(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untied(tmp_path_factory.mktemp("t5") / "untied")


only_tied = pytest.mark.parametrize("folder", ["tied"], indirect=True)


@pytest.fixture(scope="module", params=["tied", "untied"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture
def damaged(tied: Path, tmp_path: Path) -> Path:
    """Return a copy of the tied T5 that the test may damage."""
    return Path(shutil.copytree(tied, tmp_path / "damaged"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return load_text_encoder(f"t5:{folder}", CPU)


class TestEncoder:
    def test_features_are_the_mean_over_a_captions_own_tokens(self, encoder: TextEncoder, folder: Path) -> None:
        t5 = load_t5_encoder(str(folder))
        network = T5EncoderModel.from_pretrained(folder)
        features = encoder.encode(CAPTIONS)
        for caption, row in zip(CAPTIONS, features, strict=True):
            tokens = torch.tensor([t5.tokenizer(caption).input_ids])
            assert tokens[0, -1] == 1 and 2 not in tokens
            with torch.no_grad():
                expected = network(input_ids=tokens).last_hidden_state[0].mean(dim=0)
            np.testing.assert_allclose(row, expected, rtol=1e-4, atol=1e-5)

    @only_tied
    def test_rows_do_not_depend_on_neighbours(self, encoder: TextEncoder) -> None:
        captions = [" ".join(CAPTIONS[(row + n) % 5] for n in range(row % 7 + 1)) for row in range(70)]
        features = encoder.encode(captions)
        np.testing.assert_array_equal(encoder.encode(captions[::-1])[::-1], features)
        for row in (0, 1, 5, 33, 69):
            np.testing.assert_array_equal(encoder.encode([captions[row]])[0], features[row])
        assert len(np.unique(features, axis=0)) == len(set(captions))

    def test_it_reads_no_more_than_it_says(self, encoder: TextEncoder) -> None:
        long = "dog " * 200
        assert encoder.num_tokens("") == 1 and encoder.num_tokens(long) > encoder.max_tokens == LENGTHS[-1]
        one, other = encoder.encode([long + "cat", long + "red"])
        np.testing.assert_array_equal(one, other)
        assert (encoder.encode(["dog " * 20 + "cat"]) != encoder.encode(["dog " * 20 + "red"])).any()

    @only_tied
    def test_settings_tell_the_weights_which_are_used_in_float32(self, encoder: TextEncoder, damaged: Path) -> None:
        settings = encoder.settings()
        assert settings["feature_size"] == 32 and len(settings["weights_hash"]) == 16
        network = T5ForConditionalGeneration.from_pretrained(damaged)
        with torch.no_grad():
            network.encoder.block[0].layer[0].SelfAttention.q.weight[0, 0] += 1e-3
        network.half().save_pretrained(damaged)
        other = load_encoder(damaged)
        assert other.weights_hash != encoder.weights_hash
        for module in (other.module, load_decoder(damaged)):
            assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.float32}

    @only_tied
    def test_captions_end_to_end(
        self, folder: Path, tmp_path: Path, run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "t.csv").write_text("video_id,caption\n" + "".join(f"v{c[:5]},{c}\n" for c in CAPTIONS))
        monkeypatch.chdir(folder.parent)
        out = tmp_path / "c.h5"
        ran = run_svb("captions", tmp_path / "t.csv", "-o", out, "--text-encoder", f"t5:{folder.name}")
        assert (ran.exit_code, ran.stdout) == (0, f"{out}\n"), ran.stderr
        assert "Loading weights" not in ran.stderr and "[transformers]" not in ran.stderr
        held = read_caption_features(out)
        assert held.text_encoder == f"t5:{folder}"  # so that it holds in every folder
        encoder = load_text_encoder(f"t5:{folder}", CPU)
        np.testing.assert_array_equal(held.features, encoder.encode(CAPTIONS).astype(np.float16))


class TestDecoder:
    @pytest.fixture
    def decoder(self, folder: Path) -> T5Decoder:
        torch.manual_seed(2)
        return T5Decoder(str(folder), MEMORY_SIZE).eval()

    def test_it_says_what_the_whole_t5_says(self, decoder: T5Decoder, folder: Path) -> None:
        """Which sees no padding, of captions or of memory, and no later token."""
        whole = T5ForConditionalGeneration.from_pretrained(folder).eval()
        assert (whole.lm_head.weight is whole.shared.weight) == (folder.name != "untied")
        tokens, memory = make_tokens(decoder), make_memory()
        expected = whole(
            encoder_outputs=(decoder.project_memory(memory[0]),),
            attention_mask=memory[1].long(),
            decoder_input_ids=tokens,
        ).logits
        torch.testing.assert_close(logits_of(decoder, tokens, *memory), expected, rtol=1e-5, atol=1e-5)

    def test_wanted_positions_get_what_all_positions_get(self, decoder: T5Decoder) -> None:
        tokens, memory = make_tokens(decoder), make_memory()
        wanted = tokens != decoder.padding
        wanted[:, 0] = torch.tensor([True, False])
        hidden = decoder.hidden(tokens, *memory, wanted.numpy())
        assert hidden.shape == (int(wanted.sum()), 32)
        everything = decoder.hidden(tokens, *memory, torch.ones_like(wanted).numpy()).view(*tokens.shape, 32)
        torch.testing.assert_close(hidden, everything[wanted], rtol=0, atol=0)

    def test_captions_are_tokens_from_start_to_end(self, decoder: T5Decoder, folder: Path) -> None:
        tokenizer = load_t5_with_decoder(str(folder)).tokenizer
        encoded = decoder.encode([*CAPTIONS, "", "dog " * 500])
        for caption, tokens in zip(CAPTIONS, encoded, strict=False):
            assert tokens == [0, *tokenizer(caption).input_ids]
        assert encoded[-2] == [0, 1]
        assert len(encoded[-1]) == MAX_TOKENS and encoded[-1][-1] == 1
        assert decoder.padding == 0

    @only_tied
    def test_overfits_and_writes_what_it_learned(self, decoder: T5Decoder) -> None:
        torch.manual_seed(0)
        memory = torch.randn(5, 3, MEMORY_SIZE), torch.tensor([[True] * 3, [True] * 2 + [False]] * 3)[:5]
        encoded = [torch.tensor(tokens) for tokens in decoder.encode(CAPTIONS)]
        tokens = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True)
        is_token = tokens[:, 1:] != decoder.padding
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-2)
        decoder.eval()  # without dropout, so that it can be learned by heart
        losses = []
        for _ in range(80):
            with torch.autocast("cpu", torch.bfloat16):
                hidden = decoder.hidden(tokens[:, :-1], *memory, is_token.numpy())
            loss = F.cross_entropy(hidden.float() @ decoder.output_weight.T, tokens[:, 1:][is_token])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] > 3 and losses[-1] < 0.1
        decoder.train()
        assert decoder.write(*memory) == CAPTIONS
        assert decoder.training

    def test_writes_what_the_library_generates(self, decoder: T5Decoder, folder: Path) -> None:
        whole = T5ForConditionalGeneration.from_pretrained(folder).eval()
        torch.manual_seed(3)
        with torch.no_grad():  # as initialised it repeats one token for ever
            for mine, theirs in zip(
                decoder.decoder.block.parameters(), whole.decoder.block.parameters(), strict=True
            ):
                theirs.add_(0.5 * torch.randn_like(theirs))
                mine.copy_(theirs)
        frames, frame_mask = 5 * make_memory()[0], make_memory()[1]
        said = whole.generate(
            encoder_outputs=BaseModelOutput(decoder.project_memory(frames)),
            attention_mask=frame_mask.long(),
            max_new_tokens=MAX_TOKENS - 1,
            do_sample=False,
        )
        tokenizer = load_t5_with_decoder(str(folder)).tokenizer
        expected = [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]
        assert decoder.write(frames, frame_mask) == expected
        assert len(set(expected)) == 2

    @only_tied
    def test_bfloat16_stays_finite(self, decoder: T5Decoder) -> None:
        tokens, (frames, frame_mask) = make_tokens(decoder), make_memory()
        decoder.train()
        wanted = torch.ones_like(tokens, dtype=torch.bool).numpy()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = decoder.hidden(tokens, 100 * frames, frame_mask, wanted)
        (hidden.float() @ decoder.output_weight.T).logsumexp(dim=1).sum().backward()
        for name, parameter in decoder.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name

    def test_its_state_is_what_is_trained_and_its_hash_that_of_the_pretrained_weights(
        self, decoder: T5Decoder, folder: Path, tied: Path, tmp_path: Path
    ) -> None:
        state = decoder.state_dict()
        save_file(dict(state), tmp_path / "w.safetensors")  # which takes no tensor twice
        assert {name.partition(".")[0] for name in state} <= {"decoder", "output", "project_memory"}
        assert sum(tensor.shape == (160, 32) for tensor in state.values()) == (1 if decoder.output is None else 2)
        assert (decoder.weights_hash == load_decoder(tied).weights_hash) == (folder == tied)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return synthetic.make_task(tmp_path_factory.mktemp("task"), num_train=40, num_val=8)


class TestTraining:
    SMALL = ("--embedding-size", 32, "--batch-size", 16, "--learning-rate", "5e-3", "--evaluate-every", 2)

    @only_tied
    def test_train_end_to_end(
        self, task: Task, folder: Path, tmp_path: Path, run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(folder.parent)
        run, tokens = tmp_path / "run", ("--rebuild", "tokens", "--caption-decoder", f"t5:{folder.name}")
        call = ("train", *task, "-o", run, *self.SMALL, "--epochs", 6, *tokens)
        ran = run_svb(*call)
        assert (ran.exit_code, ran.stdout) == (0, f"{run}\n"), ran.stderr
        described = read_run(run)
        assert described["config"]["caption_decoder"] == f"t5:{folder}"  # so that it can be resumed from anywhere
        assert described["decoder_weights_hash"] == T5Decoder(str(folder), 32).weights_hash
        losses = [json.loads(line)["cross_captioning"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
        trained = load_checkpoint(run / "last").model
        before = {f"decoder.{name}": tensor for name, tensor in T5Decoder(str(folder), 32).state_dict().items()}
        assert set(before) <= set(trained)
        assert not any(torch.equal(trained[name], tensor) for name, tensor in before.items())
        assert "nothing to do" in run_svb(*call).stderr
        ran = run_svb("evaluate", run, "--json")
        assert ran.exit_code == 0 and "t2v/R@1" in ran.stdout, ran.stderr

    def test_a_killed_run_goes_on_to_the_same_bytes(self, task: Task, tied: Path, tmp_path: Path) -> None:
        config = dataclasses.replace(QUICK, epochs=3, evaluate_every=3, caption_decoder=f"t5:{tied}")
        whole, cut = train(*task, tmp_path / "whole", config), tmp_path / "cut"

        def stop(metrics: dict[str, float]) -> None:
            os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            train(*task, cut, config, on_epoch=stop)
        train(*task, cut, config)
        assert (cut / "last/model.safetensors").read_bytes() == (whole / "last/model.safetensors").read_bytes()

    def test_another_t5_and_options_that_mean_nothing_are_refused(
        self, task: Task, damaged: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(UsageError, match="caption_decoder is t5:x, which rebuilds tokens, but rebuild is"):
            TrainConfig(caption_decoder="t5:x", rebuild="embedding")
        with pytest.raises(InputError, match=r"holds no config\.json"):
            train(*task, tmp_path / "run", dataclasses.replace(QUICK, caption_decoder=f"t5:{tmp_path}"))
        assert not (tmp_path / "run").exists()
        config = dataclasses.replace(QUICK, caption_decoder=f"t5:{damaged}")
        train(*task, tmp_path / "run", config)
        network = T5ForConditionalGeneration.from_pretrained(damaged)
        with torch.no_grad():
            network.shared.weight[5, 5] += 1
        network.save_pretrained(damaged)
        with pytest.raises(MismatchError, match="decoder_weights_hash: stored"):
            train(*task, tmp_path / "run", config)


INSTALL = r"{} is not installed - pip install '\.\[t5\]' in svb's folder"


def load_encoder(folder: Path) -> TextEncoder:
    return load_text_encoder(f"t5:{folder}", CPU)


def load_decoder(folder: Path) -> T5Decoder:
    return T5Decoder(str(folder), 4)


def make_bert(folder: Path) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=9, **sizes)).save_pretrained(folder)


def shrink(folder: Path) -> None:
    T5ForConditionalGeneration(T5Config(**{**SIZES, "vocab_size": 64})).save_pretrained(folder)


def keep_the_encoder(folder: Path) -> None:
    T5EncoderModel.from_pretrained(folder).save_pretrained(folder)
    load_encoder(folder)


class TestErrors:
    @pytest.mark.parametrize("name", ["no-such-folder", "nobody/t5-none"])
    def test_neither_a_folder_nor_on_a_hub(
        self, name: str, tmp_path: Path, run_svb: RunSvb, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        (tmp_path / "t.csv").write_text("video_id,caption\na,a dog\n")
        ran = run_svb("captions", tmp_path / "t.csv", "-o", tmp_path / "c.h5", "--text-encoder", f"t5:{name}")
        assert ran.exit_code == 1 and "Traceback" not in ran.stderr
        assert re.search(rf"'{name}' is no folder, .*\(t5:PATH\), or choose --text-encoder off", ran.stderr)
        with pytest.raises(ModelUnavailableError, match="or choose --caption-decoder transformer"):
            T5Decoder(name, 4)

    def test_without_sentencepiece_or_protobuf(
        self, tied: Path, untied: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise ValueError("`tiktoken` is required to read a `tiktoken` file.")  # what transformers says of it

        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "sentencepiece", None)
            with pytest.raises(ModelUnavailableError, match=INSTALL.format("sentencepiece")):
                load_encoder(tied)
            load_encoder(untied)  # a tokenizer.json needs none
        monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
        monkeypatch.setitem(sys.modules, "google.protobuf", None)
        with pytest.raises(ModelUnavailableError, match=INSTALL.format("google.protobuf")):
            load_encoder(tied)

    @pytest.mark.parametrize(
        ("load", "damage", "words"),
        [
            (
                load_encoder,
                lambda folder: (folder / "config.json").unlink(),
                "holds no config.json - expected a fol",
            ),
            (
                load_encoder,
                lambda folder: (folder / "spiece.model").unlink(),
                "no vocabulary|no T5 that can be read",
            ),
            (load_encoder, shrink, r"has 1\d\d tokens, its model 64 - expected .* belong together"),
            (load_encoder, lambda folder: os.truncate(folder / WEIGHTS, 0), "holds no T5 that can be read"),
            (load_encoder, lambda folder: os.truncate(folder / WEIGHTS, 9999), "holds no T5 that can be read"),
            (load_decoder, make_bert, r"holds a 'bert' model - expected a T5, T5 v1\.1 or Flan-T5"),
            (load_decoder, keep_the_encoder, r"lacks \d+ tensors of a T5ForConditionalGeneration, first decoder"),
        ],
    )
    def test_a_folder_without_a_whole_t5(
        self, damaged: Path, load: Callable[[Path], object], damage: Callable[[Path], object], words: str
    ) -> None:
        damage(damaged)
        with pytest.raises(InputError, match=words):
            load(damaged)


def make_tokens(decoder: T5Decoder) -> torch.Tensor:
    encoded = [torch.tensor(t[:-1]) for t in decoder.encode(["a dog runs", "two cats play on a bed"])]
    return torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True)
