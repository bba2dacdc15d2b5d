"""The tab "About": what the numbers mean, what the model scores, what programs may call, and the limits."""

import gradio as gr

import querit
from space_app import views
from space_app.limits import Limits
from space_app.measured import measured
from space_app.models import Models

CARD = "https://huggingface.co/"


def add_about_tab(models: Models, limits: Limits) -> None:
    repos = {name: repo for name in models.names if (repo := models.repo(name))}
    cards = [(name, CARD + repo) for name, repo in repos.items()]
    released = querit.HUB_ID in repos.values()
    page = views.about(limits, models.names, cards, measured() if released else None)
    gr.HTML(page, apply_default_css=False)
