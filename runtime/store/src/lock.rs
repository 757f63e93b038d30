//! Locks on files of the cache. They are the kernel's (`flock`): a process that is killed leaves none behind,
//! and pods on one volume see each other's.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// The right to write what a file stands for, until it is dropped.
#[derive(Debug)]
pub(crate) struct FileLock {
    _file: File,
}

/// The right to read a file that nobody removes meanwhile.
#[derive(Debug)]
pub(crate) struct Lease {
    file: File,
    path: PathBuf,
}

impl FileLock {
    /// The lock, unless somebody has it. The file is made where it is missing.
    pub(crate) fn try_acquire(path: &Path) -> io::Result<Option<Self>> {
        loop {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
            if !try_exclusive(&file)? {
                return Ok(None);
            }
            // Whoever had it may have removed the file: then the lock is of a file that nobody finds.
            if is_still_at(&file, path)? {
                return Ok(Some(Self { _file: file }));
            }
        }
    }
}

impl Lease {
    /// A lease on a file; none where there is no file.
    pub(crate) fn acquire(path: &Path) -> io::Result<Option<Self>> {
        let file = match OpenOptions::new().read(true).open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // Waits while somebody looks whether the file can go, or removes it: a moment.
        file.lock_shared()?;
        let there = is_still_at(&file, path)?;
        Ok(there.then(|| Self { file, path: path.to_owned() }))
    }

    /// A lease on a file that is about to be moved to `path`, so that it is never there without one.
    pub(crate) fn of_new(file: File, path: &Path) -> io::Result<Self> {
        file.lock_shared()?;
        Ok(Self { file, path: path.to_owned() })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Marks the file as used now. A volume where that is not allowed evicts by age.
    pub(crate) fn touch(&self) {
        let _ = self.file.set_modified(std::time::SystemTime::now());
    }
}

/// Removes a file that nobody has a lease or a lock on. Returns whether it is gone.
pub(crate) fn remove_unused(path: &Path) -> io::Result<bool> {
    let file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        Err(error) => return Err(error),
    };
    if !try_exclusive(&file)? {
        return Ok(false);
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(true),
    }
}

fn try_exclusive(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

fn is_still_at(file: &File, path: &Path) -> io::Result<bool> {
    let held = file.metadata()?;
    match std::fs::metadata(path) {
        Ok(there) => Ok((held.dev(), held.ino()) == (there.dev(), there.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_the_lock_and_a_lease_keeps_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let held = FileLock::try_acquire(&path).unwrap();
        assert!(held.is_some() && FileLock::try_acquire(&path).unwrap().is_none());
        assert!(!remove_unused(&path).unwrap());
        drop(held);
        assert!(FileLock::try_acquire(&path).unwrap().is_some());
        let leases = [Lease::acquire(&path).unwrap(), Lease::acquire(&path).unwrap()];
        assert!(leases.iter().all(Option::is_some), "any number may read");
        assert!(!remove_unused(&path).unwrap());
        drop(leases);
        assert!(remove_unused(&path).unwrap());
        assert!(Lease::acquire(&path).unwrap().is_none());
    }
}
