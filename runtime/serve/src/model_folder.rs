//! Every model in a folder, for a server without a configuration: what `docker run -v models:/models` mounts.
//!
//! A `.gguf` file is a model with the file's name without its end; a folder with `model.safetensors` and
//! `config.json`, or with all parts of a split `.gguf` file, is a model with the folder's name.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::config::{ConfigError, ModelConfig};
use crate::config_file::source_text;

/// Folders within folders that are looked into: `publisher/model/file` has two.
const MAX_DEPTH: usize = 2;
/// Entries that are looked at: a folder with more is not a folder of models.
const MAX_ENTRIES: usize = 10_000;

/// One model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FoundModel {
    name: String,
    path: PathBuf,
    /// Size and time of its weights: a file that is still being copied differs from one look to the next.
    bytes: u64,
    modified: Option<SystemTime>,
}

impl FoundModel {
    /// The model with the defaults of a configuration.
    pub(crate) fn config(&self) -> ModelConfig {
        ModelConfig::new(self.name.clone(), source_text(&self.path))
    }
}

/// The models in a folder, sorted by path; at least one.
///
/// # Errors
/// A folder that cannot be read or holds no model, a name that is not text, or one name for two models.
pub(crate) fn find_models(folder: &Path) -> Result<Vec<FoundModel>, ConfigError> {
    let mut search = Search { folder, entries: 0, found: Vec::new() };
    search.look_into(folder, MAX_DEPTH)?;
    let mut found = search.found;
    found.sort_by(|a, b| a.path.cmp(&b.path));
    if found.is_empty() {
        return Err(ConfigError::NoModels { folder: folder.to_owned() });
    }
    let mut by_name = BTreeMap::new();
    for model in &found {
        if let Some(other) = by_name.insert(&model.name, &model.path) {
            let (name, path) = (&model.name, model.path.display());
            let message = format!("{} and {path} would both be called {name:?}; rename one", other.display());
            return Err(ConfigError::Folder { folder: folder.to_owned(), message });
        }
    }
    Ok(found)
}

/// The first of the `.gguf` files of a folder, where they are all the parts of one model.
fn first_part(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut names: Vec<String> = entries.filter(|name| name.ends_with(".gguf")).collect();
    names.sort_unstable();
    let is_split = names.len() > 1 && trustformers_store::are_parts(names.iter().map(String::as_str));
    is_split.then(|| folder.join(&names[0]))
}

struct Search<'a> {
    folder: &'a Path,
    entries: usize,
    found: Vec<FoundModel>,
}

impl Search<'_> {
    fn look_into(&mut self, folder: &Path, depth: usize) -> Result<(), ConfigError> {
        let unreadable = |cause| ConfigError::UnreadableFolder { path: folder.to_owned(), cause };
        // The weights of a checkpoint, or the list of their files.
        let whole = folder.join("model.safetensors");
        let weights = if whole.is_file() { whole } else { folder.join("model.safetensors.index.json") };
        if weights.is_file() && folder.join("config.json").is_file() {
            return self.add(folder, &weights);
        }
        if let Some(first) = first_part(folder) {
            return self.add(folder, &first);
        }
        for entry in fs::read_dir(folder).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            self.entries += 1;
            if self.entries > MAX_ENTRIES {
                let message =
                    format!("it holds more than {MAX_ENTRIES} files; name the folder of the models");
                return Err(ConfigError::Folder { folder: self.folder.to_owned(), message });
            }
            let hidden = path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if hidden {
                continue;
            }
            // What has gone since, or a link to nothing, is no model.
            let Ok(meta) = fs::metadata(&path) else { continue };
            let is_gguf = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
            if meta.is_dir() && depth > 0 {
                self.look_into(&path, depth - 1)?;
            } else if meta.is_file() && is_gguf {
                self.add(&path, &path)?;
            }
        }
        Ok(())
    }

    /// A model at a path, with its weights.
    fn add(&mut self, path: &Path, weights: &Path) -> Result<(), ConfigError> {
        let name = if path == weights { path.file_stem() } else { path.file_name() };
        let is_text = path.to_str().is_some();
        let Some(name) = name.and_then(|name| name.to_str()).filter(|_| is_text) else {
            let message = format!("the name of {} is not UTF-8; rename it", path.display());
            return Err(ConfigError::Folder { folder: self.folder.to_owned(), message });
        };
        let meta = fs::metadata(weights)
            .map_err(|cause| ConfigError::UnreadableFolder { path: weights.to_owned(), cause })?;
        self.found.push(FoundModel {
            name: name.to_owned(),
            path: path.to_owned(),
            bytes: meta.len(),
            modified: meta.modified().ok(),
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, file: &str) {
        let path = folder.join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, b"x").unwrap();
    }

    #[test]
    fn files_and_checkpoints_are_found_by_their_names() {
        let folder = tempfile::tempdir().unwrap();
        for file in [
            "a.Q4_1.gguf",
            "publisher/model/b.GGUF",
            "bert/model.safetensors",
            "bert/config.json",
            "bert/1_Pooling/config.json",
            "half/model.safetensors",
            ".hidden/c.gguf",
            "readme.md",
            "1/2/3/too_deep.gguf",
        ] {
            write(folder.path(), file);
        }
        let found = find_models(folder.path()).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|model| {
                (model.name.as_str(), model.path.strip_prefix(folder.path()).unwrap().to_str().unwrap())
            })
            .collect();
        assert_eq!(found, [("a.Q4_1", "a.Q4_1.gguf"), ("bert", "bert"), ("b", "publisher/model/b.GGUF"),]);
    }

    #[test]
    fn models_that_are_split_are_found_as_one() {
        let folder = tempfile::tempdir().unwrap();
        for file in [
            "big/x-00001-of-00002.gguf",
            "big/x-00002-of-00002.gguf",
            "sharded/config.json",
            "sharded/model.safetensors.index.json",
        ] {
            write(folder.path(), file);
        }
        let found = find_models(folder.path()).unwrap();
        let found: Vec<_> = found.iter().map(|model| (model.name.as_str(), model.path.is_dir())).collect();
        assert_eq!(found, [("big", true), ("sharded", true)]);
    }

    #[test]
    fn an_empty_folder_and_one_name_for_two_models_say_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let error = find_models(folder.path()).unwrap_err().to_string();
        assert!(
            error.contains("holds no model: put a .gguf file there") && error.contains("--config"),
            "{error}"
        );
        write(folder.path(), "a.gguf");
        write(folder.path(), "b/a.gguf");
        let error = find_models(folder.path()).unwrap_err().to_string();
        assert!(error.contains("would both be called \"a\"; rename one"), "{error}");
        let error = find_models(&folder.path().join("none")).unwrap_err().to_string();
        assert!(error.contains("none cannot be read"), "{error}");
    }

    #[test]
    fn a_file_that_grows_differs_from_one_look_to_the_next() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), "a.gguf");
        let before = find_models(folder.path()).unwrap();
        assert_eq!(find_models(folder.path()).unwrap(), before);
        fs::write(folder.path().join("a.gguf"), b"xx").unwrap();
        assert_ne!(find_models(folder.path()).unwrap(), before);
    }
}
