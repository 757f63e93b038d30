//! Artifacts of an OCI registry: ModelPack and ModelKit, files pushed as plain layers, and images.

use std::collections::BTreeMap;
use std::ops::Range;

use http::StatusCode;
use serde::Deserialize;
use tokio::sync::RwLock;

use super::registry_auth::{self, FIX, Login};
use super::{Archive, Check, Listing, Packing, RemoteFile, ranged};
use crate::digest::Digest;
use crate::error::StoreError;
use crate::http::{Answer, Http, Query, invalid_answer};
use crate::settings::Environment;
use crate::source::RemoteSource;

const EXPECTED: &str = "an OCI registry";
const MANIFESTS: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";
/// Where artifacts say the path of a layer's file: the model specification of CNCF, and ORAS.
const PATH_ANNOTATIONS: [&str; 2] = ["org.cncf.model.filepath", "org.opencontainers.image.title"];
/// ORAS packs folders, and says so.
const UNPACK_ANNOTATION: &str = "io.deis.oras.content.unpack";
/// Indexes within indexes that are followed.
const MAX_INDEXES: usize = 3;

#[derive(Debug)]
pub(crate) struct Registry {
    http: Http,
    environment: Environment,
    /// As users write it, which is how credentials are filed.
    name: String,
    /// With scheme, without a slash at its end.
    endpoint: String,
    repository: String,
    /// A tag or a digest.
    reference: String,
    /// The value of `Authorization` that the registry took last.
    authorization: RwLock<Option<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    #[serde(default)]
    layers: Vec<Layer>,
    /// Of an index: one manifest for each platform.
    #[serde(default)]
    manifests: Vec<IndexEntry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layer {
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct IndexEntry {
    digest: String,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

/// What a layer is.
#[derive(Debug, PartialEq, Eq)]
enum LayerContent {
    File(String),
    Files(Packing),
    /// A layer with no file of the model: a licence or parameters without a path.
    Nothing,
}

impl Registry {
    pub(super) fn new(
        source: &RemoteSource,
        http: Http,
        environment: Environment,
    ) -> Result<Self, StoreError> {
        let (name, rest) = source.first_and_rest();
        let (repository, reference) = match rest.split_once('@') {
            // A tag beside a digest is for people.
            Some((path, digest)) => (path.rsplit_once(':').map_or(path, |(path, _)| path), digest),
            None => rest.rsplit_once(':').unwrap_or((rest, "latest")),
        };
        let invalid = |why| StoreError::InvalidUri {
            text: source.to_string(),
            why,
            form: "oci://registry/repository:tag or oci://registry/repository@sha256:...",
        };
        let is_path = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/".contains(c);
        if repository.is_empty() || !repository.chars().all(is_path) {
            return Err(invalid("its repository is not lower-case letters, digits and . _ - /"));
        }
        if reference.contains(':') && Digest::from_hex(reference).is_none() {
            return Err(invalid("its digest is not sha256: and 64 hex digits"));
        }
        if !reference.chars().all(|c| c.is_ascii_alphanumeric() || "._-:".contains(c)) {
            return Err(invalid("its tag is not letters, digits and . _ -"));
        }
        let host = if name == "docker.io" { "registry-1.docker.io" } else { name };
        let scheme = if is_loopback(host) { "http" } else { "https" };
        Ok(Self {
            http,
            environment,
            endpoint: format!("{scheme}://{host}"),
            name: name.to_owned(),
            repository: repository.to_owned(),
            reference: reference.to_owned(),
            authorization: RwLock::default(),
        })
    }

    pub(super) fn endpoint(&self) -> String {
        self.endpoint.clone()
    }

    pub(super) async fn list(&self) -> Result<Listing, StoreError> {
        let mut reference = self.reference.clone();
        for _ in 0..MAX_INDEXES {
            let found = self.manifest(&reference).await?;
            if found.manifest.manifests.is_empty() {
                return self.listing(found);
            }
            let entries = found.manifest.manifests;
            let is_ours = |entry: &&IndexEntry| {
                entry
                    .platform
                    .as_ref()
                    .is_some_and(|on| on.os == "linux" && on.architecture == oci_architecture())
            };
            let entry = entries.iter().find(is_ours).or_else(|| entries.first());
            reference = entry.map(|entry| entry.digest.clone()).unwrap_or_default();
        }
        let query = Query::get(&self.address("manifests", &reference), self.shown(), FIX)?;
        Err(invalid_answer(&query, "its index leads to an index again and again", EXPECTED))
    }

    /// A manifest, whose digest is checked where the reference is one.
    async fn manifest(&self, reference: &str) -> Result<FoundManifest, StoreError> {
        let query = Query::get(&self.address("manifests", reference), self.shown(), FIX)?;
        let query = query.header("accept", MANIFESTS)?;
        let answer = self.send(&query).await?;
        let body = self.http.read(&query, answer, crate::http::MAX_DESCRIPTION_BYTES).await?;
        let digest = Digest::of_bytes(&body);
        if let Some(expected) = Digest::from_hex(reference).filter(|expected| *expected != digest) {
            return Err(StoreError::WrongBytes {
                what: format!("the manifest of {}", self.shown()),
                expected: expected.to_string(),
                found: digest.to_string(),
            });
        }
        let manifest = serde_json::from_slice(&body)
            .map_err(|error| invalid_answer(&query, &error.to_string(), EXPECTED))?;
        Ok(FoundManifest { manifest, digest })
    }

    fn listing(&self, found: FoundManifest) -> Result<Listing, StoreError> {
        let mut listing = Listing { version: Some(format!("sha256:{}", found.digest)), ..Listing::default() };
        for layer in found.manifest.layers {
            let Some(digest) = Digest::from_hex(&layer.digest) else {
                let (what, why) = (self.shown(), format!("the digest {:?} is no sha256", layer.digest));
                return Err(StoreError::InvalidArchive { what, why });
            };
            let file = |name: String| RemoteFile {
                name,
                bytes: layer.size,
                check: Some(Check::Sha256(digest.clone())),
                version: Some(digest.to_string()),
                etag: None,
                address: format!("sha256:{digest}"),
            };
            match content_of(&layer) {
                LayerContent::File(name) if is_inside(&name) => listing.files.push(file(name)),
                LayerContent::File(name) => {
                    let why = format!("the path {name:?} of a layer leaves the model's folder");
                    return Err(StoreError::InvalidArchive { what: self.shown(), why });
                }
                LayerContent::Files(packing) => {
                    let file = file(format!("layer {}", layer.digest));
                    listing.archives.push(Archive { file, packing });
                }
                LayerContent::Nothing => {
                    tracing::debug!(media_type = layer.media_type, "a layer without a file of the model");
                }
            }
        }
        listing.files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(listing)
    }

    pub(super) async fn get(
        &self,
        file: &RemoteFile,
        range: Option<Range<u64>>,
    ) -> Result<Answer, StoreError> {
        let query = Query::get(&self.address("blobs", &file.address), &file.name, FIX)?;
        self.send(&ranged(query, range)?).await
    }

    /// Sends a request, with a new token where the registry asks for one.
    async fn send(&self, query: &Query) -> Result<Answer, StoreError> {
        let held = self.authorization.read().await.clone();
        let (last, answer) = self.http.follow(with_authorization(query, held.as_deref())?).await?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        if answer.status() != StatusCode::UNAUTHORIZED {
            return Err(self.http.refused(&last, answer).await);
        }
        let Some(challenge) = registry_auth::challenge(answer.headers()) else {
            return Err(self.http.refused(&last, answer).await);
        };
        let login: Option<Login> = registry_auth::login(&self.environment, &self.name)?;
        let scope = format!("repository:{}:pull", self.repository);
        let value = registry_auth::authorize(&self.http, &challenge, login.as_ref(), &scope).await?;
        let Some(value) = value else { return Err(self.http.refused(&last, answer).await) };
        let answer = self.http.fetch(&with_authorization(query, Some(&value))?).await?;
        *self.authorization.write().await = Some(value);
        Ok(answer)
    }

    fn address(&self, kind: &str, reference: &str) -> String {
        format!("{}/v2/{}/{kind}/{reference}", self.endpoint, self.repository)
    }

    fn shown(&self) -> String {
        let separator = if self.reference.contains(':') { '@' } else { ':' };
        format!("oci://{}/{}{separator}{}", self.name, self.repository, self.reference)
    }
}

struct FoundManifest {
    manifest: Manifest,
    digest: Digest,
}

fn with_authorization(query: &Query, value: Option<&str>) -> Result<Query, StoreError> {
    match value {
        Some(value) => query.clone().header("authorization", value),
        None => Ok(query.clone()),
    }
}

/// As registries call the architecture of this program.
fn oci_architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

/// Registries of this machine have no certificate; container engines make the same exception.
fn is_loopback(host: &str) -> bool {
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    let address = name.trim_matches(['[', ']']).parse::<std::net::IpAddr>();
    name == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// Whether a path stays in the folder that it counts from.
pub(crate) fn is_inside(name: &str) -> bool {
    !name.is_empty() && name.split('/').all(|segment| !matches!(segment, "" | "." | ".."))
}

/// Tools agree on few things: ModelPack and ModelKit say in the media type whether a layer is an archive;
/// ORAS gives files the media type of an archive, and says in an annotation where it is one.
fn content_of(layer: &Layer) -> LayerContent {
    let kind = layer.media_type.as_str();
    let path = PATH_ANNOTATIONS.iter().find_map(|name| layer.annotations.get(*name)).cloned();
    let is_image_layer = kind.starts_with("application/vnd.oci.image.layer.")
        || kind.starts_with("application/vnd.docker.image.rootfs.");
    let is_unpacked = layer.annotations.get(UNPACK_ANNOTATION).is_some_and(|unpack| unpack == "true");
    let packing = if kind.ends_with("tar+gzip") || kind.ends_with("tar.gzip") {
        Some(Packing::TarGzip)
    } else if kind.ends_with("tar+zstd") {
        Some(Packing::TarZstd)
    } else if kind.ends_with(".tar") {
        Some(Packing::Tar)
    } else {
        None
    };
    match (packing, path) {
        (Some(_), Some(path)) if is_image_layer && !is_unpacked => LayerContent::File(path),
        (Some(packing), _) => LayerContent::Files(packing),
        (None, Some(path)) => LayerContent::File(path),
        (None, None) if kind.contains("gguf") || kind == "application/vnd.ollama.image.model" => {
            LayerContent::File("model.gguf".to_owned())
        }
        (None, None) => LayerContent::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_of_every_tool_are_told_apart() {
        let content = |kind: &str, annotations: &[(&str, &str)]| {
            let pairs = annotations.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
            let annotations = pairs.collect();
            content_of(&Layer { media_type: kind.to_owned(), digest: String::new(), size: 0, annotations })
        };
        let title = (PATH_ANNOTATIONS[1], "m.gguf");
        let file = || LayerContent::File("m.gguf".to_owned());
        let oras = "application/vnd.oci.image.layer.v1.tar";
        assert_eq!(content(oras, &[title]), file());
        assert_eq!(content(oras, &[]), LayerContent::Files(Packing::Tar), "of an image");
        let folder = [title, (UNPACK_ANNOTATION, "true")];
        assert_eq!(
            content("application/vnd.oci.image.layer.v1.tar+gzip", &folder),
            LayerContent::Files(Packing::TarGzip)
        );
        let weights = "application/vnd.cncf.model.weight.v1";
        let path = (PATH_ANNOTATIONS[0], "m.gguf");
        assert_eq!(content(&format!("{weights}.raw"), &[path]), file());
        assert_eq!(content(&format!("{weights}.tar+zstd"), &[path]), LayerContent::Files(Packing::TarZstd));
        let kit = "application/vnd.kitops.modelkit.model.v1.tar+gzip";
        assert_eq!(content(kit, &[]), LayerContent::Files(Packing::TarGzip));
        let docker = "application/vnd.docker.ai.gguf.v3";
        assert_eq!(content(docker, &[]), LayerContent::File("model.gguf".to_owned()));
        assert_eq!(content("application/vnd.ollama.image.license", &[]), LayerContent::Nothing);
    }

    #[test]
    fn references_are_read_as_container_engines_do() {
        let of = |text: &str| {
            let source: crate::source::Source = text.parse().unwrap();
            let http = Http::new(&crate::settings::FetchLimits::default());
            let registry = Registry::new(source.remote().unwrap(), http, Environment::default())?;
            Ok::<_, StoreError>((registry.endpoint, registry.repository, registry.reference))
        };
        let parts = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
        assert_eq!(of("oci://r.io/a/b:v1").unwrap(), parts("https://r.io", "a/b", "v1"));
        assert_eq!(of("oci://localhost:5000/a").unwrap(), parts("http://localhost:5000", "a", "latest"));
        let digest = format!("sha256:{}", "0".repeat(64));
        let pinned = of(&format!("oci://docker.io/a/b:v1@{digest}")).unwrap();
        assert_eq!(pinned, parts("https://registry-1.docker.io", "a/b", &digest));
        for wrong in ["oci://r.io/A/b", "oci://r.io/a@sha256:1", "oci://r.io/a:v1?x"] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}
