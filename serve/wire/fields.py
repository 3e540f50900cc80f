"""Fields of OpenAI's, vLLM's, SGLang's and llama.cpp's requests that this server does not have.

Each refused field comes with the values that change nothing. Fields without any effect on the answer, and fields that
nobody knows, are ignored; docs/rest.md lists the former.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Refused = Mapping[str, tuple[Any, ...]]

# They change what the model reads.
_PROMPT: Refused = {
    "chat_template": (),
    "documents": ([],),
    "enable_thinking": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "image_data": ([],),
    "images": ([],),
    "input_extra": ([],),
    "input_ids": (),
    "input_prefix": ("",),
    "input_suffix": ("",),
    "multi_modal_data": ({},),
    "prompt_embeds": (),
    "reasoning": ({},),
    "suffix": ("",),
    "task": (),
    "think": (),
    "thinking": (),
    "thinking_budget": (),
    "truncate_prompt_tokens": (),
}

# They change what the model writes, or what the answer holds.
_ANSWER: Refused = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (),
    "bootstrap_host": (),
    "custom_logit_processor": (),
    "custom_params": ({},),
    "do_sample": (),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "ec_transfer_params": (),
    "eta_cutoff": (0,),
    "epsilon_cutoff": (0,),
    "extra_key": (),
    "format": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "logprob_token_ids": (),
    "lora": ([],),
    "lora_path": (),
    "max_new_tokens": (),
    "min_keep": (0,),
    "min_new_tokens": (0,),
    "mirostat": (0,),
    "modalities": (["text"],),
    "n_cmpl": (1,),
    "n_indent": (0,),
    "n_predict": (-1,),
    "n_probs": (0,),
    "no_stop_trim": (False,),
    "num_beams": (1,),
    "options": ({},),
    "post_sampling_probs": (False,),
    "reasoning_format": ("auto", "deepseek"),
    "repeat_penalty": (1,),
    "repetition_detection": (),
    "response_fields": ([],),
    "return_cached_tokens_details": (False,),
    "return_hidden_states": (False,),
    "return_meta_info": (False,),
    "return_progress": (False,),
    "return_prompt_text": (False,),
    "return_prompt_token_ids": (False,),
    "return_routed_experts": (False,),
    "return_token_ids": (False,),
    "return_tokens": (False,),
    "return_tokens_as_token_ids": (False,),
    "samplers": (),
    "separate_reasoning": (True,),
    "session_params": ({},),
    "spaces_between_special_tokens": (True,),
    "stop_regex": ([],),
    "structural_tag": (),
    "t_max_predict_ms": (0, -1),
    "tfs_z": (1,),
    "thinking_budget_tokens": (-1,),
    "thinking_forced_open": (False,),
    "timings_per_token": (False,),
    "top_a": (0,),
    "top_n_sigma": (0, -1),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "vllm_xargs": ({},),
    "watermark": (False,),
    "watermarking": (False,),
    "web_search_options": (),
    "xtc_probability": (0,),
}

COMPLETION: Refused = {
    **_PROMPT,
    **_ANSWER,
    "include_reasoning": (True,),
    "thinking_token_budget": (-1,),
    "continue_final_message": (False,),
    "max_completion_tokens": (),
    "messages": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "reasoning_effort": (),
    "top_logprobs": (0,),
}
CHAT: Refused = {**_PROMPT, **_ANSWER, "prompt": ()}
# What /v1/responses and /v1/messages have beside the fields of a chat.
RESPONSES: Refused = {
    **{name: values for name, values in (_PROMPT | _ANSWER).items() if name != "reasoning"},
    "add_generation_prompt": (),
    "background": (False,),
    "background_options": (),
    "continue_final_message": (False,),
    "echo": (False,),
    "image": (),
    "logprobs": (False,),
    "max_completion_tokens": (),
    "max_tokens": (),
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "messages": (),
    "moderation": (),
    "prompt": (),
    "reasoning_effort": (),
    "truncation": ("disabled",),
}
MESSAGES: Refused = {
    **{name: values for name, values in (_PROMPT | _ANSWER).items() if name not in ("thinking",)},
    "add_generation_prompt": (),
    "container": (),
    "continue_final_message": (False,),
    "echo": (False,),
    "logprobs": (False,),
    "max_completion_tokens": (),
    "parallel_tool_calls": (True,),
    "top_logprobs": (0,),
    "context_management": (),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "prompt": (),
    "reasoning_effort": (),
    "speed": ("standard",),
}
TOKENIZE: Refused = {
    **_PROMPT,
    "add_special": (),
    "tool_choice": ("none", "auto"),
    "content": (),
    "parse_special": (True,),
    "with_pieces": (False,),
}
DETOKENIZE: Refused = {"spaces_between_special_tokens": (True,)}
MESSAGE: Refused = {
    "audio": (),
    "function_call": (),
    "images": ([],),
    "partial": (False,),
    "prefix": (False,),
    "tools": ([],),
}
HINTS: dict[str, str] = dict.fromkeys(
    ("enable_thinking", "thinking", "thinking_budget"), "; chat_template_kwargs may hold it"
)
HINTS["thinking_budget_tokens"] = "; use thinking_token_budget"
HINTS |= dict.fromkeys(("partial", "prefix"), "; continue_final_message does that")
HINTS |= dict.fromkeys(("format", "structural_tag"), "; response_format and structured_outputs do that")
HINTS |= dict.fromkeys(("max_completion_tokens", "max_new_tokens", "n_predict"), "; use max_tokens")
