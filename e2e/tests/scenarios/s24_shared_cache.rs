//! Pods that share a cache on a volume fetch a file once, also where the pod that fetches it is killed in the
//! middle. The server counts what it sends.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim};
use kube::{
    Api,
    api::{DeleteParams, PostParams},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use trustformers_e2e::{
    model::status_text,
    process,
    scenario::{Scenario, run},
    standard_load::pods_of,
    wait::Until,
};

use crate::s17_sources::{Fixture, server};

/// From apply to ready: 92 MB over the cluster's network, three pods on a small machine.
const READY_LIMIT_S: u64 = 90;

/// All pods run here, and so does the volume.
const NODE: &str = "node1";

/// A pod asks with one byte for the length of the file.
const PROBE_BYTES: u64 = 1;

/// What the server still sends to a process that was killed: a block of 256 KiB on each of its 8 connections.
const UNREAD_BYTES: u64 = 8 * (256 << 10);

#[tokio::test]
async fn pods_that_share_a_cache_fetch_a_file_once() -> Result<()> {
    run("shared-cache", async |scenario| {
        // Given: a server with a file, and two volumes of one node.
        let server = server(scenario).await?;
        let fixture = Fixture { scenario, server: &server };
        fixture.secret("web", &[]).await?;
        let whole = SharedCache::make(scenario, "whole").await?;
        let broken = SharedCache::make(scenario, "broken").await?;
        let outcome = async {
            fetched_once(&fixture, &whole).await?;
            another_pod_goes_on(&fixture, &broken).await
        };
        let outcome = outcome.await;
        whole.delete().await?;
        broken.delete().await?;
        outcome
    })
    .await
}

/// When: two pods start with an empty cache. Then: the file was sent once. A third pod gets nothing of it.
async fn fetched_once(fixture: &Fixture<'_>, cache: &SharedCache) -> Result<()> {
    let (models, server) = (fixture.scenario.models(), fixture.server);
    let mut spec = cache.spec(fixture, "files");
    spec["scaling"] = json!({"replicas": 2});
    models.apply(&cache.claim, spec).await?;
    let model = models.ready(&cache.claim, READY_LIMIT_S).await?;
    assert_eq!(status_text(&model, "/digest"), server.sha256);
    let path = format!("/files/{}", server.file);
    let sent = server.sent(&path).await?;
    let once = server.bytes..=server.bytes + 2 * PROBE_BYTES;
    assert!(once.contains(&sent.bytes), "two pods: {sent:?} of a file of {} bytes", server.bytes);

    models.change(&cache.claim, json!({"scaling": {"replicas": 3}})).await?;
    models.ready(&cache.claim, READY_LIMIT_S).await?;
    let after = server.sent(&path).await?;
    assert!(after.bytes <= sent.bytes + PROBE_BYTES, "a third pod: {after:?}, and {sent:?} before it");
    models.delete(&cache.claim).await
}

/// When: the pod that fetches is killed half-way, while another one waits for it. Then: the other one goes on
/// with the chunks that are there, and both become ready.
async fn another_pod_goes_on(fixture: &Fixture<'_>, cache: &SharedCache) -> Result<()> {
    let (models, server, name) = (fixture.scenario.models(), fixture.server, cache.claim.as_str());
    let path = format!("/held/{}", server.file);
    models.apply(name, cache.spec(fixture, "held")).await?;
    let half = Until::new("half of the file was sent, and the journal has chunks of it", 60);
    let sent_half = || async {
        let sent = server.sent(&path).await?;
        let is_half = sent.bytes >= server.bytes / 2 && cache.journalled_bytes()? > 0;
        anyhow::Ok(is_half.then_some(sent.requests))
    };
    let requests = half.polled(sent_half).await?;

    models.change(name, json!({"scaling": {"replicas": 2}})).await?;
    let asked = Until::new("the second pod has asked for the length of the file", 60);
    asked.polled(|| async { Ok((server.sent(&path).await?.requests > requests).then_some(())) }).await?;
    let found = Until::new("one of two pods has the transfer", 20);
    let TransferPids { has_it, waits } =
        found.polled(|| async { TransferPids::find(fixture.scenario, name).await.map(Some) }).await?;
    process::kill_hard(has_it).await?;
    let taken = Until::new("the other pod has the transfer", 20);
    taken.polled(|| async { Ok(has_transfer(waits)?.then_some(())) }).await?;

    let (sent, kept) = (server.sent(&path).await?.bytes, cache.journalled_bytes()?);
    server.release().await?;
    let model = models.ready(name, READY_LIMIT_S).await?;
    assert_eq!(status_text(&model, "/digest"), server.sha256);
    let again = server.sent(&path).await?.bytes - sent;
    eprintln!("{kept} of {} bytes were kept, and {again} came behind the kill", server.bytes);
    assert!(kept > 0, "nothing was kept of {sent} bytes");
    // The pod that was killed may ask for the length again.
    let most = server.bytes - kept + UNREAD_BYTES + 2 * PROBE_BYTES;
    assert!(again <= most, "{again} bytes came behind the kill, and {kept} of {} were kept", server.bytes);
    Ok(())
}

/// The processes of two pods of a model.
#[derive(Debug, Clone, Copy)]
struct TransferPids {
    /// Writes what arrives.
    has_it: u32,
    /// Waits for that.
    waits: u32,
}

impl TransferPids {
    async fn find(scenario: &Scenario, model: &str) -> Result<Self> {
        let pods = pods_of(scenario, model).await?;
        let pids = pods.iter().map(|pod| process::container_pid(pod, "runtime"));
        let pids: Vec<u32> = pids.collect::<Result<_>>()?;
        let [one, other] = pids[..] else { anyhow::bail!("two pods were expected: {pids:?}") };
        let (of_one, of_other) = (has_transfer(one)?, has_transfer(other)?);
        ensure!(of_one != of_other, "the pods have the transfer: {of_one}, {of_other}");
        let (has_it, waits) = if of_one { (one, other) } else { (other, one) };
        Ok(Self { has_it, waits })
    }
}

/// Whether a process has the file of a transfer open.
fn has_transfer(pid: u32) -> Result<bool> {
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        // One that was closed meanwhile leads nowhere.
        let target = fs::read_link(entry?.path()).unwrap_or_default();
        let is_data = target.extension().is_some_and(|end| end == "data");
        if is_data && target.parent().is_some_and(|folder| folder.ends_with("partial")) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A folder of the machine as a volume, and a claim on it. The model that uses it has the claim's name.
struct SharedCache {
    claim: String,
    volume: String,
    volumes: Api<PersistentVolume>,
    folder: TempDir,
}

impl SharedCache {
    async fn make(scenario: &Scenario, claim: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        // Pods are no user of this machine.
        fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o777))?;
        let (client, size) = (&scenario.cluster.client, json!({"storage": "1Gi"}));
        let name = format!("{}-{claim}", scenario.namespace);
        let volume: PersistentVolume = serde_json::from_value(json!({
            "metadata": {"name": name},
            "spec": {
                "capacity": size, "accessModes": ["ReadWriteMany"], "storageClassName": "",
                "persistentVolumeReclaimPolicy": "Retain",
                "hostPath": {"path": folder.path(), "type": "Directory"},
            },
        }))?;
        let claimed: PersistentVolumeClaim = serde_json::from_value(json!({
            "metadata": {"name": claim},
            "spec": {
                "accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeName": name,
                "resources": {"requests": size},
            },
        }))?;
        let volumes: Api<PersistentVolume> = Api::all(client.clone());
        volumes.create(&PostParams::default(), &volume).await?;
        let claims = Api::namespaced(client.clone(), &scenario.namespace);
        claims.create(&PostParams::default(), &claimed).await?;
        Ok(Self { claim: claim.to_owned(), volume: name, volumes, folder })
    }

    /// A model of the server's file below this path, whose pods have this cache.
    fn spec(&self, fixture: &Fixture<'_>, path: &str) -> Value {
        let server = fixture.server;
        let mut spec = fixture.spec(json!({
            "uri": format!("https://{}/{path}/{}", server.address, server.file),
            "sha256": server.sha256,
            "secretRef": {"name": "web"},
            "cache": {"pvc": {"claimName": self.claim}},
        }));
        spec["pod"] = json!({"nodeSelector": {"kubernetes.io/hostname": NODE}});
        spec
    }

    /// Bytes of complete chunks: the journal has 16 bytes, the last 8 of which are the chunk's length, and
    /// then a byte for each chunk.
    fn journalled_bytes(&self) -> Result<u64> {
        let partial = self.folder.path().join("partial");
        let mut bytes = 0;
        for entry in fs::read_dir(partial)? {
            let path = entry?.path();
            if path.extension().is_some_and(|end| end == "journal") {
                bytes += chunks_of(&path)?;
            }
        }
        Ok(bytes)
    }

    async fn delete(&self) -> Result<()> {
        self.volumes.delete(&self.volume, &DeleteParams::default()).await?;
        Ok(())
    }
}

fn chunks_of(journal: &Path) -> Result<u64> {
    let content = fs::read(journal)?;
    let Some(chunk_bytes) = content.get(8..16) else { return Ok(0) };
    let complete = content.iter().skip(16).filter(|chunk| **chunk == 1).count();
    Ok(complete as u64 * u64::from_le_bytes(chunk_bytes.try_into()?))
}
