"""Chat templates: equal to transformers' rendering, and hostile ones are stopped."""

# ruff: noqa: E501  (templates are data)

from __future__ import annotations

import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from moestro.cluster.text.chat_template import ChatTemplate, RenderBounds
from moestro.protos.errors import CheckpointError, InvalidRequest

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Grüße, 你好 🙂 <b>&amp;</b>\n"},
    {"role": "assistant", "content": "a</think>b"},
    {"role": "user", "content": ""},
]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    "chatml": "{% for m in messages %}\n{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}\n"
    "{% endfor %}\n  {% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}",
    "mistral": "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}{{ bos_token }}"
    "{%- for m in rest %}{%- if m.role == 'user' %}{% if loop.first and system is defined %}"
    "{{ ' [INST] ' ~ system ~ '\\n\\n' ~ m.content ~ ' [/INST]' }}{% else %}{{ '[INST] %s [/INST]' % m.content }}{% endif %}"
    "{%- else %}{{ m.content + eos_token }}{%- endif %}{%- endfor %}",
    "namespace": "{% set ns = namespace(last=-1, n=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.last }}/{{ ns.n }}"
    "{% for m in messages[::-1] %}{{ loop.length }}{{ loop.revindex }}{{ loop.last }}{% if loop.previtem is defined %}{{ loop.previtem.role }}{% endif %}{% endfor %}",
    "macro": "{%- macro show(m, strip=true) %}{{ m.content.split('</think>')[-1].lstrip('\\n') if strip else m.content }}"
    "{%- endmacro %}{% for m in messages %}{{ show(m) }}|{{ m | tojson }}|{{ m | tojson(indent=2) }}{% endfor %}"
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}",
    "loops": "{% for m in messages %}{% if m.role == 'assistant' %}{% break %}{% endif %}{% if loop.first %}{% continue %}"
    "{% endif %}{{ loop.index }}{{ m.content }}{% else %}none{% endfor %}"
    "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ m.content }}{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list "
    "| length }}{{ messages[1].content | indent(4) }}{{ 'a\\nb\\n\\nc' | indent(2, true) }}{{ 'aXbX' | replace('X', 'yy') }}"
    "{{ 'aXbX'.replace('X', '-', 1) }}{{ ', '.join(['a', 'b']) }}{{ '%05.1f' % 2.5 }}{{ '{}-{:>4}'.format(1, 'b') }}{{ 'Today 2024, {{{}}}'.format(1) }}{{ '{\"a\": {\"b\": %s}} of 20240101' % 3 }}{{ '%(a)5.2f%%' | format(a=2) }}"
    "{{ tools is none }}{{ 'ab' * 3 }}{{ 7 // 2 ** 2 }}{{ (1, 2) + (3,) }}{{ undefined_thing | default('d') }}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content | upper }}{% endif %}{% endfor %}",
    "call": "{% macro wrap(tag) %}<{{ tag }}>{{ caller() }}</{{ tag }}>{% endmacro %}"
    "{% call wrap('p') %}{{ messages[0].content }}{% endcall %}{% set block %}x{{ eos_token }}{% endset %}{{ block * 2 }}"
    "{% filter upper %}abc{% endfilter %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(name: str) -> None:
    (expected,), _ = render_jinja_template(
        conversations=[MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=True, **VARIABLES
    )
    assert ChatTemplate(TEMPLATES[name], "test").render(MESSAGES, VARIABLES) == expected


def test_raise_exception_is_the_callers_fault() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", "test")
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        template.render(MESSAGES, {})
    assert [violation.field for violation in caught.value.violations] == ["messages"]


def test_strftime_now() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", "test").render(MESSAGES, {}) == time.strftime("%Y")


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}",
    "{{ raise_exception.__globals__ }}",
    "{{ range.__init__.__globals__['os'] }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ namespace(a=1).__class__.__mro__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ (messages|map(attribute='__class__')|list)[0].__mro__ }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum.__globals__ }}",
    "{{ ''.format_map(messages[0]) }}",
    "{{ messages | map('attr', '__class__') | map('attr', '__subclasses__') | list | first }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_no_way_out_of_the_sandbox(source: str) -> None:
    """Refused, or rendered with nothing of Python's internals in it."""
    try:
        text = ChatTemplate(source, "test").render(MESSAGES, VARIABLES)
    except InvalidRequest:
        return
    for inside in ("class", "object", "builtins", "root:", "module", "function"):
        assert inside not in text


HUNGRY = [
    "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% else %}xxxxxxxx{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [messages] recursive %}{{ loop([messages]) }}{% endfor %}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ 10 ** 10 ** 10 }}",
    "{{ 2 ** 64 ** 8 }}",
    "{{ [0] * 10 ** 10 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '%.999999999f' % 1 }}",
    "{{ '%(a)999999999d' | format(a=1) }}",
    "{{ '%%%999999999d' % 1 }}",
    "{{ '{{{:999999999}}}'.format(1) }}",
    "{{ '{:999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 999999999) }}",
    "{{ '%999999999d' | format(1) }}",
    "{{ 'x' | center(999999999) }}",
    "{{ 'x'.ljust(999999999) }}",
    "{{ 'x'.zfill(999999999) }}",
    "{{ 'x\\ty'.expandtabs(999999999) }}",
    "{{ 'x\\ny' | indent(999999999) }}",
    "{{ messages | tojson(indent=999999999) }}",
    "{{ messages | batch(999999999, 'x') | list }}",
    "{{ messages | slice(999999999) | list }}",
    "{{ lipsum(n=999999) }}",
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x | replace('x', 'xx') %}{% endfor %}",
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x.join([ns.x, ns.x]) %}{% endfor %}",
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = '%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = '{0}{0}'.format(ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}",
    "{% set ns = namespace(x=7) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=['xx']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=['xx']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "{% set ns = namespace(x=['xx']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x | string }}",
    "{% set ns = namespace(x=['xx']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ '%s' % ns.x }}",
    "{% set ns = namespace(x=['xx']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ '{}'.format(ns.x) }}",
    "{% set ns = namespace(x=['xx']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x ~ '' }}",
    "{% set ns = namespace(x=['xx']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
    "{{ ns.x == [ns.x[0], ns.x[1]] }}{{ [ns.x] | unique | list }}",
    "{% set x = 'x' * 4000000 %}{{ ([x] * 1000000) | join }}",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "{{ (range(99999) | list) * 99999 }}",
    "{{ [[['x'] * 1000] * 1000] * 1000 }}",
    "{{ range(99999) | map('string') | map('replace', '', 'x' * 100000) | join }}",
]


@pytest.mark.parametrize("source", HUNGRY)
def test_hungry_templates_are_stopped(source: str) -> None:
    bounds = RenderBounds(max_steps=50_000, max_cpu_s=0.3, max_chars=1 << 20)
    began_s = time.thread_time()
    with pytest.raises((InvalidRequest, CheckpointError)):
        ChatTemplate(source, "test", bounds).render(MESSAGES, VARIABLES)
    assert time.thread_time() - began_s < 2.0


@pytest.mark.parametrize(
    "source", ["{% if %}", "{{", "{% for x in %}", "{% nope %}", "{{ x | nofilter }}", "(" * 3 + "{{" + "(" * 5000]
)
def test_bad_syntax_is_a_checkpoint_error(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"folder/chat_template\.jinja"):
        ChatTemplate(source, "folder/chat_template.jinja")


def test_too_long_a_template_is_a_checkpoint_error() -> None:
    with pytest.raises(CheckpointError, match="characters"):
        ChatTemplate("x" * (1 << 21), "test")


def test_a_failed_rendering_leaves_the_next_one_its_whole_budget() -> None:
    template = ChatTemplate(
        "{% for i in range(messages | length * 300) %}{% endfor %}ok", "test", RenderBounds(max_steps=1000)
    )
    with pytest.raises(InvalidRequest, match="1000 steps"):
        template.render(MESSAGES, {})
    assert template.render(MESSAGES[:1], {}) == "ok"
