//! The last good table, kept in a file so that a gateway that restarts while the operator is away can serve.
//!
//! The file is a line that names its format, the sha256 of what follows, and the table as it came over the wire. It
//! is replaced by renaming a complete new file over it: after a crash there is the old table or the new one.

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

/// Why the kept table could not be used or written.
#[derive(Debug, thiserror::Error)]
pub enum TableFileError {
    /// The file system said no.
    #[error("{path}: {cause}; the gateway needs a folder that it may write (--state-dir)", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The file begins with something else.
    #[error("{path} is not a table of this gateway's format; it is ignored and will be replaced", path = path.display())]
    Format {
        /// The file.
        path: PathBuf,
    },
    /// The file does not hold what was written.
    #[error("{path} is damaged ({what}); it is ignored and will be replaced", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What does not fit.
        what: &'static str,
    },
}

/// A table read from disk.
#[derive(Debug)]
pub struct KeptTable {
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
    /// The file in a folder, which is made if it is missing.
    ///
    /// # Errors
    /// When the folder can't be made.
    pub fn in_folder(folder: &Path) -> Result<Self, TableFileError> {
        let path = folder.join(FILE_NAME);
        fs::create_dir_all(folder).map_err(|cause| TableFileError::Io { path: folder.to_owned(), cause })?;
        Ok(Self { path })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces the kept table by an encoded one. Returns once it would survive a loss of power.
    ///
    /// # Errors
    /// When the folder can't be written.
    pub fn save(&self, encoded: &[u8]) -> Result<(), TableFileError> {
        self.replace(encoded).map_err(|cause| TableFileError::Io { path: self.path.clone(), cause })
    }

    fn replace(&self, encoded: &[u8]) -> io::Result<()> {
        // One gateway writes here, one table at a time: a fixed name leaves no litter after a crash.
        let fresh = self.path.with_extension("new");
        let mut file = File::create(&fresh)?;
        file.write_all(FORMAT_LINE)?;
        file.write_all(&Sha256::digest(encoded))?;
        file.write_all(encoded)?;
        file.sync_all()?;
        fs::rename(&fresh, &self.path)?;
        match self.path.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    }

    /// The kept table; `None` where there is none yet.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(&self) -> Result<Option<KeptTable>, TableFileError> {
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
            return Err(TableFileError::Damaged { path: path(), what: "its checksum does not fit" });
        }
        let table = RouteTable::decode(encoded)
            .map_err(|_| TableFileError::Damaged { path: path(), what: "it is not a table" })?;
        let written_at = fs::metadata(&self.path).and_then(|meta| meta.modified()).map_err(io)?;
        Ok(Some(KeptTable { table, written_at }))
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
    fn what_is_saved_is_loaded_and_the_last_wins() {
        let folder = folder();
        let file = TableFile::in_folder(&folder.path().join("below")).unwrap();
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
    fn any_changed_byte_is_found_and_named() {
        let folder = folder();
        let file = TableFile::in_folder(folder.path()).unwrap();
        file.save(&table(1).encode_to_vec()).unwrap();
        let good = fs::read(file.path()).unwrap();
        for place in 0..good.len() {
            let mut bad = good.clone();
            bad[place] ^= 1;
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
    fn a_folder_that_cannot_be_made_is_named() {
        let folder = folder();
        let occupied = folder.path().join("file");
        fs::write(&occupied, b"").unwrap();
        let text = TableFile::in_folder(&occupied).unwrap_err().to_string();
        assert!(text.contains(occupied.to_str().unwrap()) && text.contains("--state-dir"), "{text}");
    }
}
