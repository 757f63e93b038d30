//! The last valid table in a file, from which a restarted gateway serves while the operator is away.
//!
//! The file has a line with its format, the sha256 of the rest, and the table in its wire format. A complete
//! new file is renamed over it, so that after a crash the old table or the new one is there.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use prost::Message;
use sha2::{Digest, Sha256};
use trustformers_proto::control::v1::RouteTable;

const FILE_NAME: &str = "table";
const FORMAT_LINE: &[u8] = b"trustformers gateway table, format 1\n";
const DIGEST_BYTES: usize = 32;

/// Why the saved table could not be used or written.
#[derive(Debug, thiserror::Error)]
pub enum TableFileError {
    /// The file system reported an error.
    #[error("{path}: {cause}; the gateway needs a folder that it can write to (--state-dir)", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        cause: io::Error,
    },
    /// The file has another format.
    #[error("{path} is not a routing table in this gateway's format; it is ignored and the next table replaces it", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
    },
    /// The content is not what was written.
    #[error("{path} is damaged ({what}); it is ignored and the next table replaces it", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
}

/// A table read from disk.
#[derive(Debug)]
pub struct SavedTable {
    /// The table.
    pub table: RouteTable,
    /// When it was written.
    pub written_at: SystemTime,
}

/// The file in the state folder.
#[derive(Debug, Clone)]
pub struct TableFile {
    path: PathBuf,
}

impl TableFile {
    /// The file in a folder, which is created if it is missing.
    ///
    /// # Errors
    /// When the folder can't be created.
    pub fn in_folder(folder: &Path) -> Result<Self, TableFileError> {
        let path = folder.join(FILE_NAME);
        fs::create_dir_all(folder).map_err(|cause| TableFileError::Io { path: folder.to_owned(), cause })?;
        Ok(Self { path })
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces the saved table by an encoded one. Returns once it would survive a loss of power.
    ///
    /// # Errors
    /// When the folder can't be written to.
    pub fn save(&self, encoded: &[u8]) -> Result<(), TableFileError> {
        self.replace(encoded).map_err(|cause| TableFileError::Io { path: self.path.clone(), cause })
    }

    fn replace(&self, encoded: &[u8]) -> io::Result<()> {
        // One gateway writes here, one table at a time, so a fixed name leaves no other files after a crash.
        let new_path = self.path.with_extension("new");
        let mut file = File::create(&new_path)?;
        file.write_all(FORMAT_LINE)?;
        file.write_all(&Sha256::digest(encoded))?;
        file.write_all(encoded)?;
        file.sync_all()?;
        fs::rename(&new_path, &self.path)?;
        match self.path.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    }

    /// The saved table; `None` where there is none yet.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(&self) -> Result<Option<SavedTable>, TableFileError> {
        let path = || self.path.clone();
        let io = |cause| TableFileError::Io { path: path(), cause };
        let content = match fs::read(&self.path) {
            Ok(content) => content,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(io(cause)),
        };
        let rest = content.strip_prefix(FORMAT_LINE).ok_or(TableFileError::Format { path: path() })?;
        let (digest, encoded) = rest
            .split_at_checked(DIGEST_BYTES)
            .ok_or(TableFileError::Damaged { path: path(), what: "it is too short" })?;
        if Sha256::digest(encoded).as_slice() != digest {
            return Err(TableFileError::Damaged { path: path(), what: "its checksum is wrong" });
        }
        let table = RouteTable::decode(encoded)
            .map_err(|_| TableFileError::Damaged { path: path(), what: "it is not a table" })?;
        let written_at = fs::metadata(&self.path).and_then(|meta| meta.modified()).map_err(io)?;
        Ok(Some(SavedTable { table, written_at }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{TableText, endpoint_at};

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().unwrap()
    }

    fn table(counter: u64) -> RouteTable {
        TableText::new(1, counter).route("default/a", &["a"]).backend("r1", 1, &[endpoint_at("p", 1)]).wire()
    }

    #[test]
    fn the_last_saved_table_is_loaded() {
        let folder = folder();
        let file = TableFile::in_folder(&folder.path().join("created")).unwrap();
        assert!(file.load().unwrap().is_none());
        for counter in [1, 2] {
            file.save(&table(counter).encode_to_vec()).unwrap();
        }
        assert_eq!(file.load().unwrap().unwrap().table, table(2));
        let names: Vec<_> = fs::read_dir(file.path().parent().unwrap())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, [FILE_NAME]);
    }

    #[test]
    fn every_changed_byte_is_detected() {
        let folder = folder();
        let file = TableFile::in_folder(folder.path()).unwrap();
        file.save(&table(1).encode_to_vec()).unwrap();
        let good = fs::read(file.path()).unwrap();
        for index in 0..good.len() {
            let mut bad = good.clone();
            bad[index] ^= 1;
            fs::write(file.path(), &bad).unwrap();
            let text = file.load().unwrap_err().to_string();
            assert!(text.contains(file.path().to_str().unwrap()), "{text}");
        }
        for length in 0..good.len() {
            fs::write(file.path(), &good[..length]).unwrap();
            assert!(file.load().is_err(), "{length} bytes");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_created_is_named() {
        let folder = folder();
        let occupied = folder.path().join("file");
        fs::write(&occupied, b"").unwrap();
        let text = TableFile::in_folder(&occupied).unwrap_err().to_string();
        assert!(text.contains(occupied.to_str().unwrap()) && text.contains("--state-dir"), "{text}");
    }
}
