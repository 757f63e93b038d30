//! Waiting for the cluster: by watch, not by polling, and always with a limit. When the limit passes, the
//! error says what was awaited and what the watch observed last.

use std::{collections::BTreeMap, fmt::Debug, future::Future, time::Duration};

use anyhow::{Context, Result, bail};
use futures::{StreamExt, TryStreamExt};
use kube::{
    Api, Resource, ResourceExt,
    runtime::{
        WatchStreamExt,
        watcher::{self, watcher},
    },
};
use serde::{Serialize, de::DeserializeOwned};

/// What is awaited and for how long at most.
#[derive(Debug, Clone, Copy)]
pub struct Until<'a> {
    what: &'a str,
    limit: Duration,
}

impl<'a> Until<'a> {
    /// Waits for `what` (a half sentence for the error) at most `limit_s` seconds.
    #[must_use]
    pub fn new(what: &'a str, limit_s: u64) -> Self {
        Self { what, limit: Duration::from_secs(limit_s) }
    }

    /// Watches one object, present or not, until `look` finds something in it.
    ///
    /// # Errors
    /// When the limit passes: says what was observed last.
    pub async fn object<K, T>(
        self,
        api: Api<K>,
        name: &str,
        look: impl Fn(Option<&K>) -> Option<T>,
    ) -> Result<T>
    where
        K: Resource + Clone + Debug + Send + DeserializeOwned + Serialize + 'static,
    {
        let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
        self.watched(api, config, |all| look(all.first().copied())).await
    }

    /// Watches every object that `config` selects until `look` finds something in the whole set.
    ///
    /// # Errors
    /// When the limit passes: says what was observed last.
    pub async fn watched<K, T>(
        self,
        api: Api<K>,
        config: watcher::Config,
        look: impl Fn(&[&K]) -> Option<T>,
    ) -> Result<T>
    where
        K: Resource + Clone + Debug + Send + DeserializeOwned + Serialize + 'static,
    {
        let mut observed = Observed { objects: BTreeMap::new(), listed: false };
        let mut last_error = None;
        let search = async {
            let mut events = std::pin::pin!(watcher(api, config).default_backoff());
            loop {
                match events.try_next().await {
                    Ok(Some(event)) => observed.take(event),
                    Ok(None) => return None,
                    Err(error) => last_error = Some(error),
                }
                if let Some(found) = observed.look(&look) {
                    return Some(found);
                }
            }
        };
        match tokio::time::timeout(self.limit, search).await {
            Ok(Some(found)) => Ok(found),
            Ok(None) => bail!("the watch ended while waiting until {}", self.what),
            Err(_) => bail!(
                "not within {:?}: {}; last observed:\n{}{}",
                self.limit,
                self.what,
                observed.shown(),
                last_error.map_or_else(String::new, |error| format!("last error of the watch: {error}"))
            ),
        }
    }

    /// Calls `probe` ten times a second until it finds something. Only for what has no watch, such as a
    /// gateway's answer: the last error of the probe becomes part of the error at the limit.
    ///
    /// # Errors
    /// When the limit passes: with the probe's last error.
    pub async fn polled<T, F>(self, mut probe: impl FnMut() -> F) -> Result<T>
    where
        F: Future<Output = Result<Option<T>>>,
    {
        let mut ticks = tokio::time::interval(Duration::from_millis(100));
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last_error = None;
        let search = async {
            loop {
                ticks.tick().await;
                match probe().await {
                    Ok(Some(found)) => return found,
                    Ok(None) => {}
                    Err(error) => last_error = Some(error),
                }
            }
        };
        let ended = tokio::time::timeout(self.limit, search).await;
        ended.with_context(|| {
            let error = last_error.map_or_else(String::new, |error| format!("; last error: {error:#}"));
            format!("not within {:?}: {}{error}", self.limit, self.what)
        })
    }
}

struct Observed<K> {
    objects: BTreeMap<String, K>,
    // Before the first full list an empty set does not mean that there are no objects.
    listed: bool,
}

impl<K: Resource + Serialize> Observed<K> {
    fn take(&mut self, event: watcher::Event<K>) {
        match event {
            watcher::Event::Init => {
                self.objects.clear();
                self.listed = false;
            }
            watcher::Event::InitApply(object) | watcher::Event::Apply(object) => {
                self.objects.insert(key(&object), object);
            }
            watcher::Event::Delete(object) => {
                self.objects.remove(&key(&object));
            }
            watcher::Event::InitDone => self.listed = true,
        }
    }

    fn look<T>(&self, look: impl Fn(&[&K]) -> Option<T>) -> Option<T> {
        if self.listed { look(&self.objects.values().collect::<Vec<_>>()) } else { None }
    }

    fn shown(&self) -> String {
        if self.objects.is_empty() {
            return "no such object\n".to_owned();
        }
        let text = |object: &K| {
            let mut value = serde_json::to_value(object).unwrap_or_default();
            if let Some(metadata) = value.get_mut("metadata").and_then(|it| it.as_object_mut()) {
                metadata.remove("managedFields");
            }
            serde_yaml::to_string(&value).unwrap_or_default()
        };
        self.objects.values().map(text).collect::<Vec<_>>().join("---\n")
    }
}

fn key<K: Resource>(object: &K) -> String {
    format!("{}/{}", object.namespace().unwrap_or_default(), object.name_any())
}

/// Every change of the selected objects, as the watch delivers it.
pub fn changes<K>(api: Api<K>, config: watcher::Config) -> impl futures::Stream<Item = K>
where
    K: Resource + Clone + Debug + Send + DeserializeOwned + 'static,
{
    let touched = |event| async {
        match event {
            Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => Some(object),
            _ => None,
        }
    };
    watcher(api, config).default_backoff().filter_map(touched)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;

    use super::*;

    fn named(name: &str) -> ConfigMap {
        let mut object = ConfigMap::default();
        object.metadata.name = Some(name.to_owned());
        object
    }

    #[test]
    fn an_empty_set_is_reported_only_after_the_full_list() {
        let mut observed = Observed::<ConfigMap> { objects: BTreeMap::new(), listed: false };
        let empty = |all: &[&ConfigMap]| all.is_empty().then_some(());
        observed.take(watcher::Event::Init);
        assert_eq!(observed.look(empty), None);
        observed.take(watcher::Event::InitDone);
        assert_eq!(observed.look(empty), Some(()));
        observed.take(watcher::Event::Apply(named("a")));
        assert_eq!(observed.look(empty), None);
        observed.take(watcher::Event::Delete(named("a")));
        assert_eq!(observed.look(empty), Some(()));
    }

    #[tokio::test(start_paused = true)]
    async fn the_error_at_the_limit_names_the_last_error_of_the_probe() {
        let error = Until::new("it answers", 1).polled(|| async { bail!("refused") as Result<Option<()>> });
        let error = error.await.unwrap_err().to_string();
        assert!(error.contains("it answers") && error.contains("refused"), "{error}");
    }
}
