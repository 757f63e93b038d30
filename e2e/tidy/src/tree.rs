//! The files of the repository, as git would commit them: tracked ones, and new ones that are not ignored. So
//! a rule finds a fault before the commit, and build outputs and caches are not read.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Why the tree can't be read.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// git is missing or refused.
    #[error(
        "git ls-files failed in {root}: {message}; the tidy rules need a git checkout and git on the path"
    )]
    Git {
        /// The folder that was asked about.
        root: PathBuf,
        /// The error of git or of the system.
        message: String,
    },
    /// A listed file can't be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
}

/// One committed or about to be committed file.
#[derive(Debug, Clone)]
pub struct File {
    /// Path relative to the root, with forward slashes.
    pub path: String,
    /// Size in bytes.
    pub bytes: usize,
    /// The text; none for a file that is not UTF-8 or holds a zero byte.
    pub text: Option<String>,
}

impl File {
    /// A file of text, as tests plant it.
    pub fn from_text(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), bytes: text.len(), text: Some(text.to_owned()) }
    }

    /// The last component of the path.
    pub fn name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }

    /// True for Rust source.
    pub fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }

    /// Lines with their numbers from 1; nothing for a binary file.
    pub fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        self.text.as_deref().unwrap_or_default().lines().enumerate().map(|(index, line)| (index + 1, line))
    }
}

/// The repository's root: two folders above this crate.
pub fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_path_buf()
}

/// Reads all files of the repository at `root`, sorted by path. Symbolic links and files deleted but not yet
/// committed are left out.
///
/// # Errors
/// When git can't list the files or one of them can't be read.
pub fn read(root: &Path) -> Result<Vec<File>, TreeError> {
    let git = |message: String| TreeError::Git { root: root.to_path_buf(), message };
    let listed = Command::new("git")
        // A checkout that another user owns (as in a container) is fine to read.
        .args(["-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root)
        .output()
        .map_err(|error| git(error.to_string()))?;
    if !listed.status.success() {
        return Err(git(String::from_utf8_lossy(&listed.stderr).trim().to_owned()));
    }
    let names = String::from_utf8(listed.stdout).map_err(|error| git(error.to_string()))?;
    let mut paths: Vec<&str> = names.split('\0').filter(|name| !name.is_empty()).collect();
    paths.sort_unstable();
    paths.dedup();
    let mut files = Vec::with_capacity(paths.len());
    for path in paths {
        let full = root.join(path);
        if !full.symlink_metadata().is_ok_and(|meta| meta.is_file()) {
            continue;
        }
        let content = std::fs::read(&full).map_err(|source| TreeError::Read { path: full, source })?;
        files.push(file_of(path, content));
    }
    Ok(files)
}

fn file_of(path: &str, content: Vec<u8>) -> File {
    let bytes = content.len();
    let text = String::from_utf8(content).ok().filter(|text| !text.contains('\0'));
    File { path: path.to_owned(), bytes, text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_binary_are_told_apart() {
        assert_eq!(file_of("a", b"plain".to_vec()).text.as_deref(), Some("plain"));
        assert_eq!(file_of("a", b"with\0zero".to_vec()).text, None);
        assert_eq!(file_of("a", vec![0xff, 0xfe]).text, None);
    }

    #[test]
    fn the_repository_lists_this_file_and_no_build_output() {
        let files = read(&root()).unwrap();
        assert!(files.iter().any(|file| file.path == "e2e/tidy/src/tree.rs"));
        assert!(!files.iter().any(|file| file.path.starts_with("target/")));
    }

    #[test]
    fn a_folder_without_git_is_an_error_that_names_it() {
        let error = read(Path::new("/proc")).unwrap_err().to_string();
        assert!(error.contains("/proc"), "{error}");
    }
}
