//! The model with real weights that several tests use.

use std::path::PathBuf;

const REAL_MODEL: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// The real model, where `make models` puts it; none where it is missing and not required.
pub(crate) fn real_model() -> Option<PathBuf> {
    let folder = std::env::var_os("TRUSTFORMERS_MODELS").map(PathBuf::from).or_else(|| {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
        Some(cache.join("trustformers/models"))
    })?;
    let file = folder.join(REAL_MODEL);
    if file.is_file() {
        return Some(file);
    }
    let required = std::env::var("TRUSTFORMERS_REQUIRE_MODELS").is_ok_and(|value| value == "1");
    assert!(!required, "{} is missing; run `make models`", file.display());
    eprintln!("skipped: {} is missing; run `make models`", file.display());
    None
}
