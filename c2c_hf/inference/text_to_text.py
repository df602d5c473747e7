"""Text-to-text communication, a baseline: what the sharer is asked, and where the receiver gets its answer."""

#: The sharer's answer is begun, since a base model would start with a new line or a list.
BACKGROUND_BEGINNING = "It helps to know that"


def background_request(question: str) -> str:
    """Return the message that asks a sharer for background of a question."""
    return (
        "Write one sentence of background knowledge that helps to answer the question. Do not answer it.\n\n"
        f"Question: {question}"
    )


def background_prompt(question: str) -> str:
    """Return the same as plain text with the beginning of the sentence, for a sharer without a chat template."""
    return f"{background_request(question)}\nBackground: {BACKGROUND_BEGINNING}"


def background_prefix(background: str) -> str:
    """Return what goes in front of the receiver's prompt.

    Args:
        background: The sharer's sentence behind `BACKGROUND_BEGINNING`.
    """
    return f"Background: {BACKGROUND_BEGINNING} {background.strip()}\n\n"
