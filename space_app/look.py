"""Colours and letters of the page; `style.css` has those of the results. Fonts are the system's: none is fetched."""

import gradio as gr

TEAL = gr.themes.Color(
    name="querit", c50="#eef8f7", c100="#d9eeec", c200="#b4dedb", c300="#83c8c3", c400="#4fc4bb", c500="#0f7d7a",
    c600="#0d6e6e", c700="#0a5858", c800="#0c4646", c900="#17393a", c950="#0b2526",
)  # fmt: skip


def theme() -> gr.themes.Base:
    sans = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans CJK SC", "sans-serif")
    mono = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace")
    look = gr.themes.Base(primary_hue=TEAL, neutral_hue="slate", radius_size="md", font=sans, font_mono=mono)
    return look.set(
        body_background_fill="#f6f7f9",
        body_background_fill_dark="#12161b",
        body_text_color="#1c2430",
        body_text_color_dark="#e8ebf0",
        body_text_color_subdued="#566173",
        body_text_color_subdued_dark="#a3adbb",
        block_background_fill="#ffffff",
        block_background_fill_dark="#191e25",
        block_border_color="#e6e9ee",
        block_border_color_dark="#2c333d",
        block_label_text_color="#566173",
        block_label_text_color_dark="#a3adbb",
        block_title_text_color="#1c2430",
        block_title_text_color_dark="#e8ebf0",
        border_color_primary="#e6e9ee",
        border_color_primary_dark="#2c333d",
        input_background_fill="#ffffff",
        input_background_fill_dark="#12161b",
        input_border_color="#c9d0da",
        input_border_color_dark="#3b4552",
        button_primary_background_fill="#0d6e6e",
        button_primary_background_fill_hover="#0a5858",
        button_primary_background_fill_dark="#1d7f7b",
        button_primary_background_fill_hover_dark="#24918c",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_dark="#191e25",
        button_secondary_border_color="#c9d0da",
        button_secondary_border_color_dark="#3b4552",
        input_placeholder_color="#66717f",
        input_placeholder_color_dark="#8f9aaa",
        link_text_color="#0d6e6e",
        link_text_color_dark="#4fc4bb",
        link_text_color_hover="#0a5858",
        link_text_color_hover_dark="#83c8c3",
        input_border_width="1px",
        input_border_color_focus="#0d6e6e",
        input_border_color_focus_dark="#4fc4bb",
        button_border_width="1px",
        button_large_text_size="15px",
        button_large_text_weight="550",
        button_secondary_text_color="#1c2430",
        button_secondary_text_color_dark="#e8ebf0",
        button_secondary_background_fill_hover="#eef8f7",
        button_secondary_background_fill_hover_dark="#232a33",
        background_fill_primary_dark="#191e25",
        background_fill_secondary_dark="#12161b",
    )
