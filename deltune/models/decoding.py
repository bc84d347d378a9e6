"""The `decoding` section: every field of transformers' GenerationConfig that means something here, and what becomes of it.

Light to import. Fields that another setting holds are in ELSEWHERE, those that nothing here can honour in REFUSED; a
test holds the three together against the GenerationConfig that is installed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltune.config.fields import changed, option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHES = ("dynamic", "static", "offloaded", "offloaded_static", "quantized")


@dataclass(frozen=True)
class DecodingConfig:
    """How tokens are chosen, beyond temperature, top_k, top_p and repetition_penalty; names as in transformers' GenerationConfig."""

    num_beams: int = option(1, "Beams of a beam search; 1 does without. With beams temperature above 0 draws within the search.", ge=1)
    length_penalty: float = option(1.0, "With beams: a beam's score is divided by its length to this power; above 0 favours long answers.")
    early_stopping: bool | str = option(False, "With beams: true ends at num_beams finished answers; false once better ones are improbable; never only when they are impossible.", choices=(False, True, "never"))
    min_new_tokens: int = option(0, "No EOS before so many tokens of an answer.", ge=0, unit="tokens")
    min_length: int = option(0, "No EOS before so many tokens of prompt and answer together.", ge=0, unit="tokens")
    typical_p: float = option(1.0, "When drawing: tokens nearest to the expected information that make up this much probability (arXiv:2202.00666).", gt=0, le=1)
    epsilon_cutoff: float = option(0.0, "When drawing: least probability of a token (arXiv:2210.15191).", ge=0, lt=1)
    eta_cutoff: float = option(0.0, "When drawing: least probability, which falls with the entropy (arXiv:2210.15191).", ge=0, lt=1)
    top_h: float | None = option(None, "When drawing: tokens whose entropy stays below this share of the whole's (arXiv:2509.02510).", gt=0, le=1)
    no_repeat_ngram_size: int = option(0, "No run of so many tokens stands twice in prompt and answer; 0 allows all.", ge=0)
    encoder_no_repeat_ngram_size: int = option(0, "No run of so many tokens of the prompt stands in the answer; 0 allows all.", ge=0)
    encoder_repetition_penalty: float = option(1.0, "Above 1 makes tokens that are not in the prompt less probable.", gt=0)
    bad_words: list[str] = option([], "Texts that an answer never holds, with and without a space before them.")
    sequence_bias: dict[str, float] = option({}, "Text to what is added to the score of the token that would complete it.")
    suppress_tokens: list[int] = option([], "Token ids that are never chosen.")
    begin_suppress_tokens: list[int] = option([], "Token ids that do not begin an answer.")
    forced_bos_token_id: int | None = option(None, "Token id that the answer to a prompt of a single token begins with.", ge=0)
    forced_eos_token_id: int | None = option(None, "Token id that an answer of full length ends with.", ge=0)
    stop_ids: list[int] = option([], "Token ids that end an answer, besides the model's own (transformers' eos_token_id).")
    exponential_decay_length_penalty: list[float] = option([], "[start, factor]: from this many tokens of an answer on, EOS grows more probable by a power of the factor.")
    guidance_scale: float = option(1.0, "Above 1: classifier-free guidance (arXiv:2306.17806) away from the model's answer to the prompt's last token alone.", ge=1)
    watermark: dict[str, float] = option({}, "Watermark (arXiv:2306.04634): greenlist_ratio, bias, hashing_key, context_width; {bias: 2.0} takes the rest as transformers has it.")
    remove_invalid_values: bool = option(False, "Put the largest finite value in the place of scores that are none (NaN), instead of ending with an error.")
    renormalize_logits: bool = option(False, "With beams: normalise the scores again after all else changed them.")
    max_time: float | None = option(None, "Seconds for one batch of answers; they end where they are. Makes answers depend on the machine.", gt=0, unit="s")
    use_cache: bool = option(True, "Keep keys and values of earlier tokens.")
    cache_implementation: str | None = option(None, "Kind of that cache; null is the model's own.", choices=CACHES)
    prefill_chunk_size: int | None = option(None, "Read a long prompt in pieces of so many tokens.", gt=0, unit="tokens")

    def problems(self) -> list[str]:
        found = []
        if self.num_beams == 1:
            found += [f"{key} has no effect without beams: num_beams is 1" for key in ("length_penalty", "early_stopping", "renormalize_logits") if changed(self, key)]
        if len(self.exponential_decay_length_penalty) not in (0, 2):
            found.append("exponential_decay_length_penalty must be two numbers: [start, factor]")
        unknown = sorted(set(self.watermark) - set(WATERMARK))
        if unknown:
            found.append(f"watermark has {', '.join(unknown)}; there are {', '.join(WATERMARK)}")
        if not self.use_cache and (self.cache_implementation is not None or self.prefill_chunk_size is not None):
            found.append("use_cache=false leaves cache_implementation and prefill_chunk_size without effect")
        return found


WATERMARK = {"greenlist_ratio": float, "bias": float, "hashing_key": int, "context_width": int}
DRAWING = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")  # without effect where nothing is drawn
# what shapes an answer by all tokens before it, padding among them, or by a clock: prompts of one length only share a batch
BY_PLACE = (
    "min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "sequence_bias", "bad_words",
    "forced_bos_token_id", "guidance_scale", "watermark", "prefill_chunk_size", "exponential_decay_length_penalty",
)  # fmt: skip

# GenerationConfig's field -> the setting that says it here
ELSEWHERE = {
    "max_new_tokens": "max_new_tokens", "temperature": "temperature", "do_sample": "temperature above 0", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
    "repetition_penalty": "repetition_penalty", "stop_strings": "stop", "max_length": "max_new_tokens, which counts the answer alone",
    "eos_token_id": "decoding.stop_ids", "bad_words_ids": "decoding.bad_words", "watermarking_config": "decoding.watermark",
    "num_return_sequences": "repeat", "force_words_ids": "choices", "constraints": "choices", "pad_token_id": "the tokenizer's own",
    "bos_token_id": "the tokenizer's own",
}  # fmt: skip
# GenerationConfig's field -> why it is not taken
_ASSISTED = "assisted decoding gives several tokens at a time, and here each is looked at"
_HUB = "transformers runs it by code from the hub, which this program never does"
_RETURNED = "answers come back as texts"
REFUSED = {
    **dict.fromkeys(
        ("use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
         "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind",
         "assistant_ensemble_weight", "speculation_type"), _ASSISTED),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups", "low_memory"), _HUB),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"), _RETURNED),
    "decoder_start_token_id": "there is no encoder",
    "token_healing": "it rewrites the prompt's last token, and prompts are tokenised as in training",
    "max_cache_len": "a cache is made for prompt and answer", "cache_config": "cache_implementation's defaults are taken",
    **dict.fromkeys(("compile_config", "disable_compile"), "a static cache is compiled as transformers does by default"),
    "continuous_batching_config": "batches are made of prompts of like length",
    **dict.fromkeys(("transformers_version", "_from_model_config"), "a record of the file, no setting"),
}  # fmt: skip


def by_place(config: DecodingConfig) -> bool:
    """Whether padding before a prompt could change its answer."""
    return any(changed(config, key) for key in BY_PLACE)


def transformers_fields(config: DecodingConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What GenerationConfig is given of these settings, and only what differs from their defaults."""
    plain = {
        "num_beams": config.num_beams, "length_penalty": config.length_penalty, "early_stopping": config.early_stopping,
        "renormalize_logits": config.renormalize_logits, "min_new_tokens": config.min_new_tokens, "min_length": config.min_length,
        "no_repeat_ngram_size": config.no_repeat_ngram_size, "encoder_no_repeat_ngram_size": config.encoder_no_repeat_ngram_size,
        "encoder_repetition_penalty": config.encoder_repetition_penalty, "suppress_tokens": config.suppress_tokens,
        "begin_suppress_tokens": config.begin_suppress_tokens, "forced_bos_token_id": config.forced_bos_token_id,
        "forced_eos_token_id": config.forced_eos_token_id, "guidance_scale": config.guidance_scale,
        "remove_invalid_values": config.remove_invalid_values, "max_time": config.max_time, "use_cache": config.use_cache,
        "cache_implementation": config.cache_implementation, "prefill_chunk_size": config.prefill_chunk_size,
    }  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in plain.items() if changed(config, name)}
    if config.exponential_decay_length_penalty:
        start, factor = config.exponential_decay_length_penalty
        given["exponential_decay_length_penalty"] = (int(start), factor)
    if config.bad_words:
        given["bad_words_ids"] = [list(ids) for text in config.bad_words for ids in spellings(tokenizer, text)]
    if config.sequence_bias:
        given["sequence_bias"] = {ids: bias for text, bias in config.sequence_bias.items() for ids in spellings(tokenizer, text)}
    if config.watermark:
        from transformers import WatermarkingConfig

        given["watermarking_config"] = WatermarkingConfig(**{key: WATERMARK[key](value) for key, value in config.watermark.items()})
    return given


def spellings(tokenizer: PreTrainedTokenizerBase, text: str) -> list[tuple[int, ...]]:
    """The tokens of a text at the beginning of a line and after a space, which many tokenizers write differently."""
    found = {tuple(tokenizer(form, add_special_tokens=False)["input_ids"]) for form in (text, " " + text.lstrip())}
    return sorted(ids for ids in found if ids)


def warpers(config: DecodingConfig) -> list[Any]:
    """transformers' own processors of the fields in DRAWING: (ids, scores) -> scores, in transformers' order."""
    from transformers.generation import (
        EpsilonLogitsWarper,
        EtaLogitsWarper,
        TopHLogitsWarper,
        TypicalLogitsWarper,
    )

    made: list[Any] = []
    if config.top_h is not None:
        made.append(TopHLogitsWarper(top_h=config.top_h))
    if config.typical_p < 1:
        made.append(TypicalLogitsWarper(mass=config.typical_p))
    if config.epsilon_cutoff:
        made.append(EpsilonLogitsWarper(epsilon=config.epsilon_cutoff))
    if config.eta_cutoff:
        made.append(EtaLogitsWarper(epsilon=config.eta_cutoff))
    return made
