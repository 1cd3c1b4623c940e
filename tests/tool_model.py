"""The tiny model with a chat template that takes tools, which its own does not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

TEMPLATE = """\
{%- if tools -%}
    {{- '<|im_start|>system\\nThere are functions:\\n' -}}
    {%- for tool in tools -%}
        {{- (tool | tojson) + '\\n' -}}
    {%- endfor -%}
    {{- 'Call one with <tool_call>{"name": ..., "arguments": {...}}</tool_call>.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {{- part.text if part.type == 'text' else '<|vision_start|><|image_pad|><|vision_end|>' -}}
        {%- endfor -%}
    {%- endif -%}
    {%- for call in message.tool_calls or [] -%}
        {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' + (call.function.arguments | tojson) -}}
        {{- '}</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""

# Every call of it is short, whatever model makes it.
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Köln", "Paris"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def make_tool_model(tiny_model_dir: Path, directory: Path) -> Path:
    shutil.copytree(tiny_model_dir, directory, dirs_exist_ok=True)
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return directory
