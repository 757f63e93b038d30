//! Model files: GGUF, tokenizers, architectures lowered to a Plan.
