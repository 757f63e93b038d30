"""Hooks of schemathesis: bodies ask for few tokens, so that each request ends soon."""

import schemathesis

# Fields with the number of tokens at most, and the most that a generated body may ask for.
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
MOST_TOKENS = 4


def limited(body):
    """The body, with a small number of tokens where it asks for many or for the rest of the context."""
    if not isinstance(body, dict):
        return body
    limits = [name for name in LIMITS if isinstance(body.get(name), int) and body[name] > MOST_TOKENS]
    return body | dict.fromkeys(limits, MOST_TOKENS)


@schemathesis.hook
def before_call(context, case, kwargs):
    """Bounds what is asked for, also where the field is left out."""
    case.body = limited(case.body)
    if not isinstance(case.body, dict) or case.method != "POST":
        return
    path = case.path
    if path.endswith(("/chat/completions", "/completions", "/generate/stream", "/v1/generate")):
        case.body.setdefault("max_tokens", MOST_TOKENS)
    elif path.endswith("/responses"):
        case.body.setdefault("max_output_tokens", MOST_TOKENS)
    if isinstance(case.body.get("n"), int) and case.body["n"] > 2:
        case.body["n"] = 2
