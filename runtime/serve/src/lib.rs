//! All in one process, and the library trustformers_serve.
