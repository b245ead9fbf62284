import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.document import Document
from data_pipelines.geometry import Geometry
from data_pipelines.rows import build_documents
from nmm_jax.evaluation.sampling import Sampling, choose, writable


@pytest.fixture(scope="module")
def prompts(noise):
    return [
        Document("text", "", ("hello",)),
        Document("image", "", (noise(0), "what")),
        Document("two images", "", (noise(1), "and", noise(2), "then")),
        Document("image first and last", "", (noise(3), "is", noise(4))),
    ]


def greedy_without_cache(run, letters, prompt, count):
    """The likeliest next token of the whole row, computed anew for every token."""
    geometry = Geometry.from_config(run.config)
    hidden_of = jax.jit(lambda params, batch: run.model.hidden(params, batch)[0])
    unembedding = np.asarray(run.model.unembedding(run.params), np.float64)
    written = []
    for _ in range(count):
        text = letters.decode(written)
        parts = list(prompt.parts)
        if text and isinstance(parts[-1], str):
            parts[-1] += text
        elif text:
            parts.append(text)
        batch = build_documents([Document(prompt.id, "", tuple(parts))], letters, geometry, append_eos=False)
        last = int((batch["segment_ids"] > 0).sum()) - 1
        logits = np.asarray(hidden_of(run.params, batch)[0, last], np.float64) @ unembedding
        allowed = [letters.eos, *range(6, letters.vocab_size)]
        token = allowed[int(np.argmax(logits[allowed]))]
        if token == letters.eos:
            break
        written.append(token)
    return written


def test_the_cache_changes_nothing(run, letters, sampler, prompts):
    expected = [greedy_without_cache(run, letters, prompt, 12) for prompt in prompts]
    found = sampler.generate(prompts, 12)  # four prompts, three at a time
    assert found == expected
    assert len({tuple(tokens) for tokens in expected}) > 1, "this model says the same to everybody; the test is empty"


def test_a_full_row_ends_the_text(run, sampler):
    letters_left = run.config.row_length - len("abcde") - 1  # one is BOS
    (written,) = sampler.generate([Document("p", "", ("abcde",))], 1000)
    assert len(written) == letters_left + 1, "the last one needs no place of its own; does this model say EOS?"


def test_special_tokens_and_ids_without_a_text_are_never_written(letters):
    allowed = writable(letters, 48)
    assert allowed.tolist() == [i == letters.eos or 6 <= i < letters.vocab_size for i in range(48)]


DRAWN = Sampling(temperature=2.0)


def test_eos_ends_the_text(letters, sampler, noise):
    prompts = [Document(str(i), "", (noise(i), "abc")) for i in range(3)]
    texts = []
    for seed in range(12):
        columns = np.stack(list(sampler.stream(prompts, 20, DRAWN, seed)), 1)
        assert not (columns == letters.eos).any()
        for row in columns:
            ended = np.flatnonzero(row == -1)
            assert not ended.size or (row[ended[0] :] == -1).all()
        texts += [int((row >= 0).sum()) for row in columns]
    assert 0 < sum(n < 20 for n in texts) < len(texts), "no text, or every text, ended early: the test is empty"


def test_the_same_seed_gives_the_same_text_and_another_another(sampler, prompts):
    assert sampler.generate(prompts[:1], 20, DRAWN, 1) == sampler.generate(prompts[:1], 20, DRAWN, 1)
    assert sampler.generate(prompts[:1], 20, DRAWN, 1) != sampler.generate(prompts[:1], 20, DRAWN, 2)


def test_what_is_sampled_does_not_depend_on_the_company(sampler, prompts):
    together = sampler.generate(prompts, 20, DRAWN, seed=5)
    assert together == [sampler.generate([prompt], 20, DRAWN, seed=5 + i)[0] for i, prompt in enumerate(prompts)]


def draws(logits, sampling, count=4000):
    keys = jax.random.split(jax.random.key(0), count)
    return np.asarray(choose(jnp.tile(jnp.asarray(logits), (count, 1)), keys, sampling))


LOGITS = np.log([0.4, 0.3, 0.15, 0.1, 0.05])


def test_temperature_is_a_power_of_the_probabilities():
    found = np.bincount(draws(LOGITS, Sampling(temperature=2.0)), minlength=5) / 4000
    expected = np.sqrt(np.exp(LOGITS)) / np.sqrt(np.exp(LOGITS)).sum()
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / 4000))


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(), {0}),
        (Sampling(temperature=1.0), {0, 1, 2, 3, 4}),
        (Sampling(temperature=1.0, top_k=2), {0, 1}),
        (Sampling(temperature=1.0, top_k=9), {0, 1, 2, 3, 4}),
        (Sampling(temperature=1.0, top_p=0.35), {0}),  # the likeliest token alone reaches it
        (Sampling(temperature=1.0, top_p=0.8), {0, 1, 2}),  # 0.4 + 0.3 fall short, 0.85 reach it
        (Sampling(temperature=1.0, top_k=3, top_p=0.8), {0, 1}),  # of three, 0.4 and 0.3 are 0.82
    ],
)
def test_which_tokens_can_be_drawn(sampling, kept):
    assert set(draws(LOGITS, sampling).tolist()) == kept


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0"),
    ],
)
def test_settings_that_cannot_be_meant(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


def test_too_many_prompts_for_one_stream(sampler, prompts):
    with pytest.raises(ValueError, match="4 prompts for a sampler of 3 rows"):
        next(sampler.stream(prompts, 5))
