//! Model sources: files, globs and digests.
