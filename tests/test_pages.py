"""What a template is given is text, whatever it holds; a page asks for nothing else."""

from __future__ import annotations

import jinja2
import pytest
from markupsafe import Markup

from gpukern.pages import render
from tests.browser import Parsed


@pytest.fixture
def template(tmp_path):
    path = tmp_path / "page.html"
    title, body = "{% block title %}{{ name }}{% endblock %}", "{% block body %}<p>{{ told }}</p>{% endblock %}"
    path.write_text('{% extends "base.html" %}' + title + body)
    return path


def test_a_page_is_well_formed_and_the_same_each_time(template):
    html = render(template, name="a name", told="something")
    assert html.startswith("<!doctype html>") and html == render(template, name="a name", told="something")
    assert "a name something" in Parsed(html).words
    assert "default-src 'none'" in html and "http" not in html.replace("http-equiv", "")


def test_text_is_escaped_and_cannot_steer(template):
    html = render(template, name="<b>\x1b[31m", told="one & two\nlines\x07")
    assert "&lt;b&gt;�[31m" in html and "<p>one &amp; two\nlines�</p>" in html


def test_markup_stays_as_it_is(template):
    assert "<p><i>x</i></p>" in render(template, name="", told=Markup("<i>x</i>"))


def test_a_value_that_is_missing_is_an_error(template):
    with pytest.raises(jinja2.UndefinedError, match="told"):
        render(template, name="a name")
