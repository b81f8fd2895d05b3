"""Chat templates (jinja) of our own for checkpoints that ship none.

On the chats that the released templates handle they render the same text (tests hold the recorded renderings). Beyond
those, tools are written as the Qwen3 models that Keye-VL builds on expect them.
"""

from __future__ import annotations

_TOOLS = """\
{%- macro tool_list() %}
    {{- "# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n" }}
    {{- "You are provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" ~ (tool | tojson) }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments" }}
    {{- " within <tool_call></tool_call> XML tags:\\n<tool_call>\\n" }}
    {{- '{"name": <function-name>, "arguments": <args-json-object>}' }}
    {{- "\\n</tool_call>" }}
{%- endmacro %}
{%- macro call_list(calls, after_text) %}
    {%- for call in calls %}
        {%- set function = call.function if call.function else call %}
        {{- "\\n" if after_text or not loop.first }}
        {{- '<tool_call>\\n{"name": "' ~ function.name ~ '", "arguments": ' }}
        {{- function.arguments if function.arguments is string else function.arguments | tojson }}
        {{- "}\\n</tool_call>" }}
    {%- endfor %}
{%- endmacro %}
"""

KEYE_TEMPLATE = (
    _TOOLS
    + """\
{%- set seen = namespace(pictures=0, videos=0) %}
{%- macro write(content) %}
    {%- for item in ([content] if content is string else content or []) %}
        {%- if item is string %}
            {{- item }}
        {%- elif item.type == "image" or "image" in item or "image_url" in item %}
            {%- set seen.pictures = seen.pictures + 1 %}
            {{- "Picture " ~ seen.pictures ~ ": " if add_vision_id }}
            {{- "<|vision_start|><|image_pad|><|vision_end|>" }}
        {%- elif item.type == "video" or "video" in item %}
            {%- set seen.videos = seen.videos + 1 %}
            {{- "Video " ~ seen.videos ~ ": " if add_vision_id }}
            {{- "<|vision_start|><|video_pad|><|vision_end|>" }}
        {%- elif "text" in item %}
            {{- item.text }}
        {%- endif %}
    {%- endfor %}
{%- endmacro %}
{%- if messages and messages[0].role != "system" %}
    {{- "<|im_start|>system\\nYou are a helpful assistant." }}
    {{- "\\n\\n" ~ tool_list() if tools }}
    {{- "<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
        {{- "<|im_start|>user" if loop.first or loop.previtem.role != "tool" }}
        {{- "\\n<tool_response>\\n" }}
        {{- write(message.content) }}
        {{- "\\n</tool_response>" }}
        {{- "<|im_end|>\\n" if loop.last or loop.nextitem.role != "tool" }}
    {%- else %}
        {{- "<|im_start|>" ~ message.role ~ "\\n" }}
        {{- write(message.content) }}
        {{- "\\n\\n" ~ tool_list() if tools and loop.first and message.role == "system" }}
        {{- call_list(message.tool_calls, message.content) if message.tool_calls }}
        {{- "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{{- "<|im_start|>assistant\\n" if add_generation_prompt }}
"""
)
"""Pictures, videos and text (the released processor's template)."""

QWEN2_VL_TEMPLATE = KEYE_TEMPLATE
"""Keye-VL took over the prompt of Qwen2-VL, whose own template knows no tools."""

KEYE_TEXT_TEMPLATE = (
    _TOOLS
    + """\
{%- set last = namespace(question=(messages | length) - 1) %}
{%- for message in messages %}
    {%- if message.role == "user" and message.content is string and not (
        message.content.startswith("<tool_response>") and message.content.endswith("</tool_response>")) %}
        {%- set last.question = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if tools and messages[0].role != "system" %}
    {{- "<|im_start|>system\\n" ~ tool_list() ~ "<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {%- set text = message.content if message.content is string else "" %}
    {%- if message.role == "tool" %}
        {{- "<|im_start|>user" if loop.first or loop.previtem.role != "tool" }}
        {{- "\\n<tool_response>\\n" ~ text ~ "\\n</tool_response>" }}
        {{- "<|im_end|>\\n" if loop.last or loop.nextitem.role != "tool" }}
    {%- elif message.role == "assistant" %}
        {%- set thought = message.reasoning_content or "" %}
        {%- if not thought and "</think>" in text %}
            {%- set thought = text.split("</think>")[0].rstrip("\\n").split("<think>")[-1].lstrip("\\n") %}
            {%- set text = text.split("</think>")[-1].lstrip("\\n") %}
        {%- endif %}
        {{- "<|im_start|>assistant\\n" }}
        {%- if loop.index0 > last.question and (loop.last or thought) %}
            {{- "<think>\\n" ~ thought.strip("\\n") ~ "\\n</think>\\n\\n" ~ text.lstrip("\\n") }}
        {%- else %}
            {{- text }}
        {%- endif %}
        {{- call_list(message.tool_calls, text) if message.tool_calls }}
        {{- "<|im_end|>\\n" }}
    {%- else %}
        {{- "<|im_start|>" ~ message.role ~ "\\n" ~ text }}
        {{- "\\n\\n" ~ tool_list() if tools and loop.first and message.role == "system" }}
        {{- "<|im_end|>\\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
    {{- "<think>\\n\\n</think>\\n\\n" if enable_thinking is defined and enable_thinking is false }}
{%- endif %}
"""
)
"""Text alone: earlier thoughts are left out of the history (the released tokenizer's template)."""

KIMI_TEMPLATE = """\
{%- macro write(content) %}
    {%- for item in ([content] if content is string else content or []) %}
        {%- if item is string %}
            {{- item }}
        {%- elif item.type == "image" or "image" in item or "image_url" in item %}
            {{- "<|media_start|>image<|media_content|><|media_pad|><|media_end|>" }}
        {%- elif "text" in item %}
            {{- item.text }}
        {%- else %}
            {{- raise_exception("Kimi-VL takes text and pictures; give frames of a video as pictures") }}
        {%- endif %}
    {%- endfor %}
{%- endmacro %}
{%- set seen = namespace(calls=0) %}
{%- macro name_of_call(id, before) %}
    {%- set found = namespace(number=-1, name=id) %}
    {%- for message in messages[:before] %}
        {%- for call in message.tool_calls or [] %}
            {%- set found.number = found.number + 1 %}
            {%- if call.id == id %}
                {%- set found.name = "functions." ~ call.function.name ~ ":" ~ found.number %}
            {%- endif %}
        {%- endfor %}
    {%- endfor %}
    {{- found.name }}
{%- endmacro %}
{%- if tools %}
    {{- "<|im_system|>tool_declare<|im_middle|>" ~ (tools | tojson(separators=(",", ":"))) ~ "<|im_end|>" }}
{%- endif %}
{%- if messages and messages[0].role != "system" %}
    {{- "<|im_system|>system<|im_middle|>You are a helpful assistant<|im_end|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ("system", "user", "assistant", "tool") %}
        {{- raise_exception("Kimi-VL has no turns of the role " ~ message.role) }}
    {%- endif %}
    {%- if message.role == "tool" %}
        {{- "<|im_system|>tool<|im_middle|>## Return of " ~ name_of_call(message.tool_call_id or "", loop.index0) ~ "\\n" }}
    {%- else %}
        {{- "<|im_" ~ message.role ~ "|>" ~ message.role ~ "<|im_middle|>" }}
    {%- endif %}
    {{- write(message.content) }}
    {%- if message.tool_calls %}
        {{- "<|tool_calls_section_begin|>" }}
        {%- for call in message.tool_calls %}
            {{- "<|tool_call_begin|>functions." ~ call.function.name ~ ":" ~ seen.calls ~ "<|tool_call_argument_begin|>" }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- "<|tool_call_end|>" }}
            {%- set seen.calls = seen.calls + 1 %}
        {%- endfor %}
        {{- "<|tool_calls_section_end|>" }}
    {%- endif %}
    {{- "<|im_end|>" }}
{%- endfor %}
{{- "<|im_assistant|>assistant<|im_middle|>" if add_generation_prompt }}
"""
"""Kimi-VL: pictures and text; thoughts of earlier turns stand in their text (SGLang ``conversation.py``, kimi-vl). Tools, calls
and their results stand as Kimi-K2's own template writes them; calls are numbered through the chat."""
