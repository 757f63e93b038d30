//! Tokens of ServiceAccounts: a signed statement of the cluster that a caller is who it says.
//!
//! A token is accepted where the cluster signed it, it has not expired, it was made for this audience and it
//! is that of one account. The audience is what keeps a token that another program was given from being used
//! here. The public keys are those that the API server publishes at `/openid/v1/jwks`; they are read from a
//! file, so that a pod needs no rights on the API server.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use trustformers_api::ApiError;
use trustformers_proto::pod_config::{PodAdmin, PodConfig};

use super::signatures;

/// What clusters sign with. Others, such as those with a shared secret, are refused whatever a token says.
const ALGORITHMS: [Algorithm; 2] = [Algorithm::RS256, Algorithm::ES256];
/// Seconds by which the clocks of two machines may differ.
const CLOCK_SKEW_S: u64 = 30;
/// Longest token. Those of ServiceAccounts have about 1.2 KiB.
const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// Time between two readings of the files. Kubelet brings a changed ConfigMap within about a minute, and a
/// cluster publishes a new key long before it signs with it.
const KEYS_PERIOD: Duration = Duration::from_secs(30);

/// Which tokens are accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenRules {
    /// A file with the cluster's public keys, a JSON Web Key Set.
    pub keys_file: PathBuf,
    /// The audience that the token must be made for.
    pub audience: String,
    /// The account: `system:serviceaccount:NAMESPACE:NAME`.
    pub subject: String,
    /// The issuer, where it is checked.
    pub issuer: Option<String>,
}

impl TokenRules {
    /// The rules of a `pod.yaml`.
    #[must_use]
    pub fn of_pod(admin: &PodAdmin) -> Self {
        Self {
            keys_file: admin.keys_file.clone().into(),
            audience: admin.audience.clone(),
            subject: admin.subject.clone(),
            issuer: admin.issuer.clone(),
        }
    }
}

/// Why the keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The file cannot be read.
    #[error("{} cannot be read: {cause}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said; the message holds it, so it is no source.
        cause: std::io::Error,
    },
    /// The file holds no keys.
    #[error(
        "{} is no JSON Web Key Set: {why}; take what the API server answers at /openid/v1/jwks",
        path.display()
    )]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// Checks tokens.
pub(super) struct TokenVerifier {
    in_force: ArcSwap<RulesInForce>,
    /// The `pod.yaml` whose section `admin` has the rules; none: they stay as they are.
    pod_config: Option<PathBuf>,
}

/// The rules and the keys that go with them.
struct RulesInForce {
    rules: TokenRules,
    keys: JwkSet,
}

/// The claim that is compared here; the others are compared by the decoder.
#[derive(Deserialize)]
struct Claims {
    sub: String,
}

impl TokenVerifier {
    /// Reads the keys. Those of a pod of the operator may come later: until then no token is accepted.
    pub(super) fn new(rules: TokenRules, pod_config: Option<PathBuf>) -> Result<Self, KeysError> {
        signatures::install();
        let keys = match read_keys(&rules.keys_file) {
            Err(error) if pod_config.is_some() => {
                tracing::warn!("the admin port accepts no token yet: {error}");
                JwkSet { keys: Vec::new() }
            }
            keys => keys?,
        };
        Ok(Self { in_force: ArcSwap::from_pointee(RulesInForce { rules, keys }), pod_config })
    }

    /// Reads the rules and the keys again and again, until `stop`. What cannot be read leaves the present
    /// ones in force.
    pub(super) async fn follow_keys(self: Arc<Self>, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(KEYS_PERIOD);
        ticks.tick().await;
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                () = stop.cancelled() => return,
            }
            let (config, present) = (self.pod_config.clone(), self.in_force.load().rules.clone());
            let read = move || {
                let rules = config.and_then(|path| read_rules(&path)).unwrap_or(present);
                read_keys(&rules.keys_file).map(|keys| RulesInForce { rules, keys })
            };
            match tokio::task::spawn_blocking(read).await {
                Ok(Ok(in_force)) => self.in_force.store(Arc::new(in_force)),
                Ok(Err(error)) => tracing::warn!("the keys of the admin port stay as they are: {error}"),
                // The process ends.
                Err(_) => return,
            }
        }
    }

    /// Checks the value of an `authorization` header.
    ///
    /// # Errors
    /// `Unauthenticated` for a token that proves nothing, `Forbidden` for that of another account.
    pub(super) fn check(&self, authorization: Option<&[u8]>) -> Result<(), ApiError> {
        let in_force = self.in_force.load();
        let RulesInForce { rules, keys } = &**in_force;
        let refused = |why: &str| ApiError::Unauthenticated {
            message: format!(
                "{why}; send \"authorization: Bearer TOKEN\" with a token of {} for the audience {:?}",
                rules.subject, rules.audience
            ),
        };
        let Some(header) = authorization else { return Err(refused("there is no token")) };
        let text = std::str::from_utf8(header).ok().and_then(bearer);
        let token = text.ok_or_else(|| refused("the header authorization holds no bearer token"))?;
        if token.len() > MAX_TOKEN_BYTES {
            return Err(refused("the token is too long"));
        }
        let claims = verify(rules, keys, token).map_err(|why| refused(&why))?;
        if claims.sub != rules.subject {
            let message = format!("models are changed here by {} alone", rules.subject);
            return Err(ApiError::Forbidden { message });
        }
        Ok(())
    }
}

fn verify(rules: &TokenRules, keys: &JwkSet, token: &str) -> Result<Claims, String> {
    let header = decode_header(token).map_err(|_| "it is no signed token".to_owned())?;
    if !ALGORITHMS.contains(&header.alg) {
        return Err(format!("tokens signed with {:?} are not accepted", header.alg));
    }
    let key = match &header.kid {
        Some(id) => keys.find(id),
        None => keys.keys.first().filter(|_| keys.keys.len() == 1),
    };
    let key = key.ok_or("the cluster has no key that it could be signed with")?;
    let key = DecodingKey::from_jwk(key).map_err(|error| format!("its key cannot be used: {error}"))?;
    let mut validation = Validation::new(header.alg);
    validation.leeway = CLOCK_SKEW_S;
    validation.validate_nbf = true;
    validation.set_audience(&[&rules.audience]);
    validation.set_required_spec_claims(&["exp", "aud", "sub"]);
    if let Some(issuer) = &rules.issuer {
        validation.set_issuer(&[issuer]);
        validation.set_required_spec_claims(&["exp", "aud", "sub", "iss"]);
    }
    let decoded = decode::<Claims>(token, &key, &validation);
    decoded.map(|token| token.claims).map_err(|error| format!("the token is refused ({error})"))
}

/// The token of `Bearer TOKEN`; the word in any case.
fn bearer(text: &str) -> Option<&str> {
    let (scheme, token) = text.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

/// The rules of a `pod.yaml`; none where it cannot be read.
fn read_rules(pod_config: &Path) -> Option<TokenRules> {
    let text = std::fs::read_to_string(pod_config).ok()?;
    match PodConfig::parse(&text) {
        Ok(config) => config.admin.as_ref().map(TokenRules::of_pod),
        Err(error) => {
            tracing::warn!("who may use the admin port stays as it is: {error}");
            None
        }
    }
}

fn read_keys(path: &Path) -> Result<JwkSet, KeysError> {
    let text = std::fs::read(path).map_err(|cause| KeysError::Unreadable { path: path.to_owned(), cause })?;
    let malformed = |why: String| KeysError::Malformed { path: path.to_owned(), why };
    let keys: JwkSet = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
    if keys.keys.is_empty() {
        return Err(malformed("it has no key".to_owned()));
    }
    Ok(keys)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use jsonwebtoken::get_current_timestamp;
    use ring::rand::SystemRandom;
    use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
    use serde_json::{Value, json};

    /// A cluster that signs tokens.
    pub(in crate::admin) struct Cluster {
        pair: EcdsaKeyPair,
        pub(in crate::admin) folder: tempfile::TempDir,
    }

    const SUBJECT: &str = "system:serviceaccount:trustformers:operator";
    const AUDIENCE: &str = "trustformers-pods.team";

    impl Cluster {
        pub(in crate::admin) fn new() -> Self {
            let (random, algorithm) = (SystemRandom::new(), &ECDSA_P256_SHA256_FIXED_SIGNING);
            let document = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
            let pair = EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random).unwrap();
            // One byte says that the point is not compressed.
            let (x, y) = pair.public_key().as_ref()[1..].split_at(32);
            let coordinate = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
            let key = json!({
                "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": "k1",
                "x": coordinate(x), "y": coordinate(y),
            });
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("jwks"), json!({"keys": [key]}).to_string()).unwrap();
            Self { pair, folder }
        }

        pub(in crate::admin) fn rules(&self) -> TokenRules {
            TokenRules {
                keys_file: self.folder.path().join("jwks"),
                audience: AUDIENCE.to_owned(),
                subject: SUBJECT.to_owned(),
                issuer: Some("https://cluster".to_owned()),
            }
        }

        /// The token of the operator, with these claims instead.
        pub(in crate::admin) fn token(&self, instead: &Value) -> String {
            let mut claims = json!({
                "iss": "https://cluster", "sub": SUBJECT, "aud": [AUDIENCE], "exp": get_current_timestamp() + 600,
            });
            claims.as_object_mut().unwrap().extend(instead.as_object().unwrap().clone());
            let message = message(&json!({"alg": "ES256", "kid": "k1"}), &claims);
            let signature = self.pair.sign(&SystemRandom::new(), message.as_bytes()).unwrap();
            format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
        }
    }

    /// What of a token is signed.
    fn message(header: &Value, claims: &Value) -> String {
        let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        format!("{}.{}", encode(header), encode(claims))
    }

    fn check(verifier: &TokenVerifier, token: &str) -> Result<(), ApiError> {
        verifier.check(Some(format!("Bearer {token}").as_bytes()))
    }

    #[test]
    fn only_a_valid_token_of_the_account_for_this_audience_is_accepted() {
        let cluster = Cluster::new();
        let verifier = TokenVerifier::new(cluster.rules(), None).unwrap();
        assert_eq!(check(&verifier, &cluster.token(&json!({}))), Ok(()));
        let now = get_current_timestamp();
        for (claims, why) in [
            (json!({"aud": ["https://kubernetes.default.svc"]}), "InvalidAudience"),
            // That for the pods of another namespace.
            (json!({"aud": ["trustformers-pods.other"]}), "InvalidAudience"),
            (json!({"exp": now - 600}), "ExpiredSignature"),
            (json!({"nbf": now + 600}), "ImmatureSignature"),
            (json!({"iss": "https://elsewhere"}), "InvalidIssuer"),
        ] {
            let error = check(&verifier, &cluster.token(&claims)).unwrap_err();
            assert!(matches!(error, ApiError::Unauthenticated { .. }), "{error}");
            assert!(error.to_string().contains(why) && error.to_string().contains(AUDIENCE), "{error}");
        }
        let other = cluster.token(&json!({"sub": "system:serviceaccount:default:default"}));
        assert!(matches!(check(&verifier, &other), Err(ApiError::Forbidden { .. })));
        let foreign = Cluster::new().token(&json!({}));
        assert!(check(&verifier, &foreign).unwrap_err().to_string().contains("InvalidSignature"));
        let mut changed = cluster.token(&json!({}));
        changed.truncate(changed.len() - 4);
        assert!(check(&verifier, &changed).is_err());
    }

    #[test]
    fn what_is_no_token_of_a_cluster_is_refused() {
        let cluster = Cluster::new();
        let verifier = TokenVerifier::new(cluster.rules(), None).unwrap();
        for header in [None, Some(&b"Basic abc"[..]), Some(b"Bearer "), Some(b"Bearer a.b.c"), Some(b"\xff")]
        {
            assert!(matches!(verifier.check(header), Err(ApiError::Unauthenticated { .. })), "{header:?}");
        }
        let token = cluster.token(&json!({}));
        assert_eq!(verifier.check(Some(format!("bearer {token}").as_bytes())), Ok(()), "any case");
        // A token does not choose how it is checked: neither by a shared secret nor not at all.
        let claims = json!({"sub": SUBJECT, "aud": AUDIENCE, "exp": get_current_timestamp() + 600});
        let forged = format!("{}.c2lnbmVk", message(&json!({"alg": "HS256", "kid": "k1"}), &claims));
        assert!(check(&verifier, &forged).unwrap_err().to_string().contains("HS256"));
        let rsa = format!("{}.c2lnbmVk", message(&json!({"alg": "RS256", "kid": "k1"}), &claims));
        assert!(check(&verifier, &rsa).unwrap_err().to_string().contains("InvalidAlgorithm"));
        let unsigned = format!("{}.", message(&json!({"alg": "none", "kid": "k1"}), &claims));
        assert!(check(&verifier, &unsigned).is_err());
        assert!(check(&verifier, &"a".repeat(20_000)).unwrap_err().to_string().contains("too long"));
    }

    #[test]
    fn a_token_of_a_cluster_with_rsa_keys_is_accepted() {
        let folder = tempfile::tempdir().unwrap();
        let keys_file = folder.path().join("jwks");
        std::fs::write(&keys_file, include_str!("testdata/jwks.json")).unwrap();
        let rules = TokenRules {
            keys_file,
            // The stored token was issued for this one.
            audience: "trustformers-pods".to_owned(),
            subject: SUBJECT.to_owned(),
            issuer: None,
        };
        let verifier = TokenVerifier::new(rules, None).unwrap();
        assert_eq!(check(&verifier, include_str!("testdata/rs256.jwt").trim()), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn keys_that_change_are_read_again_and_a_broken_file_leaves_them() {
        let (old, new) = (Cluster::new(), Cluster::new());
        let verifier = Arc::new(TokenVerifier::new(old.rules(), None).unwrap());
        let stop = CancellationToken::new();
        let following = tokio::spawn(Arc::clone(&verifier).follow_keys(stop.clone()));
        let until = async |accepted: &Cluster| {
            while check(&verifier, &accepted.token(&json!({}))).is_err() {
                tokio::time::sleep(KEYS_PERIOD).await;
            }
        };
        std::fs::copy(new.rules().keys_file, old.rules().keys_file).unwrap();
        until(&new).await;
        assert!(check(&verifier, &old.token(&json!({}))).is_err());
        std::fs::write(old.rules().keys_file, "{}").unwrap();
        tokio::time::sleep(2 * KEYS_PERIOD).await;
        until(&new).await;
        stop.cancel();
        following.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_pod_takes_keys_and_rules_that_its_config_map_brings_later() {
        let cluster = Cluster::new();
        let (keys, config) = (cluster.folder.path().join("later"), cluster.folder.path().join("pod.yaml"));
        let rules = TokenRules { keys_file: keys.clone(), subject: "nobody".to_owned(), ..cluster.rules() };
        let verifier = Arc::new(TokenVerifier::new(rules, Some(config.clone())).unwrap());
        assert!(check(&verifier, &cluster.token(&json!({}))).is_err(), "there is no key yet");
        let stop = CancellationToken::new();
        let following = tokio::spawn(Arc::clone(&verifier).follow_keys(stop.clone()));
        std::fs::copy(cluster.rules().keys_file, &keys).unwrap();
        let text = format!(
            "model: {{names: [m], revision: r, path: /m}}\nadmin: {{port: 1, keysFile: {}, audience: {AUDIENCE}, subject: '{SUBJECT}'}}\n",
            keys.display()
        );
        std::fs::write(&config, text).unwrap();
        while check(&verifier, &cluster.token(&json!({}))).is_err() {
            tokio::time::sleep(KEYS_PERIOD).await;
        }
        stop.cancel();
        following.await.unwrap();
    }

    #[test]
    fn a_file_without_keys_is_refused_with_its_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let missing = read_keys(&folder.path().join("none")).unwrap_err().to_string();
        assert!(missing.contains("none cannot be read"), "{missing}");
        std::fs::write(folder.path().join("jwks"), r#"{"keys": []}"#).unwrap();
        let empty = read_keys(&folder.path().join("jwks")).unwrap_err().to_string();
        assert!(empty.contains("/openid/v1/jwks"), "{empty}");
    }
}
