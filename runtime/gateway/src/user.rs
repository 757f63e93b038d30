//! The user of a request: the value of a header, or a claim of its bearer token.
//!
//! The gateway decodes a token and does not verify its signature: it has no keys. The claim decides which
//! variant of a test a user gets and where the request counts, and nothing else. A proxy in front of the
//! gateway must refuse tokens that are not valid, as it must set or remove the header.

use std::borrow::Cow;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName};
use serde_json::{Map, Value};

use crate::ab_test::TestUser;

/// The longest token that is decoded: what HTTP servers accept as one header.
const MAX_TOKEN_BYTES: usize = 8 << 10;
/// The longest user in a token.
const MAX_USER_BYTES: usize = 256;

/// How a route finds the user of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserRule {
    /// The header whose value is the user, where no claim is.
    pub header: HeaderName,
    /// The claim of the bearer token that is the user.
    pub claim: Option<String>,
    /// Hashed with the user.
    pub salt: String,
}

impl UserRule {
    /// The user of a request with these headers; none where it names none.
    pub(crate) fn user<'a>(&self, headers: &'a HeaderMap) -> Option<Cow<'a, [u8]>> {
        match &self.claim {
            Some(claim) => claim_of(headers, claim).map(|user| Cow::Owned(user.into_bytes())),
            None => {
                let user = headers.get(&self.header).map(|user| Cow::Borrowed(user.as_bytes()));
                user.filter(|user| !user.is_empty())
            }
        }
    }
}

/// The user of a request, to be compared with that of another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KnownUser {
    rule: Arc<UserRule>,
    fingerprint: u64,
}

impl KnownUser {
    /// The user that a rule found.
    pub(crate) fn new(rule: &Arc<UserRule>, user: TestUser) -> Self {
        Self { rule: Arc::clone(rule), fingerprint: user.fingerprint }
    }

    /// Whether a request with these headers is of the same user.
    pub(crate) fn sent(&self, headers: &HeaderMap) -> bool {
        let user = self.rule.user(headers);
        user.is_some_and(|user| TestUser::of(&self.rule.salt, &user).fingerprint == self.fingerprint)
    }
}

/// A claim of the bearer token, a text or a number. None where there is no token with three parts, where its
/// head names no algorithm, or where the claim is missing or too long.
fn claim_of(headers: &HeaderMap, claim: &str) -> Option<String> {
    let (scheme, token) = headers.get(AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    let token = token.trim();
    if !scheme.eq_ignore_ascii_case("bearer") || token.len() > MAX_TOKEN_BYTES {
        return None;
    }
    let mut parts = token.split('.');
    let (head, claims, signature) = (parts.next()?, parts.next()?, parts.next()?);
    if signature.is_empty() || parts.next().is_some() {
        return None;
    }
    // An unsigned token is one that no proxy verified.
    object(head)?
        .get("alg")?
        .as_str()
        .filter(|algorithm| !algorithm.is_empty() && !algorithm.eq_ignore_ascii_case("none"))?;
    let user = match object(claims)?.remove(claim)? {
        Value::String(user) => user,
        Value::Number(number) => number.to_string(),
        _ => return None,
    };
    (1..=MAX_USER_BYTES).contains(&user.len()).then_some(user)
}

fn object(part: &str) -> Option<Map<String, Value>> {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(head: &str, claims: &str, signature: &str) -> String {
        let [head, claims] = [head, claims].map(|part| URL_SAFE_NO_PAD.encode(part));
        format!("{head}.{claims}.{signature}")
    }

    fn user(authorization: &str) -> Option<String> {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, authorization.parse().unwrap());
        claim_of(&headers, "sub")
    }

    #[test]
    fn a_claim_of_a_signed_token_is_the_user() {
        let head = r#"{"alg":"RS256","typ":"JWT"}"#;
        let signed = token(head, r#"{"sub":"ann","aud":"x"}"#, "c2ln");
        assert_eq!(user(&format!("Bearer {signed}")).as_deref(), Some("ann"));
        assert_eq!(user(&format!("bearer  {signed}")).as_deref(), Some("ann"));
        let number = token(head, r#"{"sub":17}"#, "c2ln");
        assert_eq!(user(&format!("Bearer {number}")).as_deref(), Some("17"));
    }

    #[test]
    fn a_token_of_another_shape_names_no_user() {
        let head = r#"{"alg":"RS256"}"#;
        let claims = r#"{"sub":"ann"}"#;
        let long = format!(r#"{{"sub":"{}"}}"#, "a".repeat(MAX_USER_BYTES + 1));
        for bad in [
            format!("Basic {}", token(head, claims, "c2ln")),
            format!("Bearer {}", token(head, claims, "")),
            format!("Bearer {}.more", token(head, claims, "c2ln")),
            format!("Bearer {}", token(r#"{"alg":"none"}"#, claims, "c2ln")),
            format!("Bearer {}", token("{}", claims, "c2ln")),
            format!("Bearer {}", token(head, "[]", "c2ln")),
            format!("Bearer {}", token(head, r#"{"sub":{}}"#, "c2ln")),
            format!("Bearer {}", token(head, r#"{"sub":""}"#, "c2ln")),
            format!("Bearer {}", token(head, &long, "c2ln")),
            format!("Bearer {}", "a".repeat(MAX_TOKEN_BYTES + 1)),
            "Bearer".to_owned(),
        ] {
            assert_eq!(user(&bad), None, "{bad}");
        }
        assert_eq!(claim_of(&HeaderMap::new(), "sub"), None);
    }

    #[test]
    fn a_request_of_another_user_is_told_apart() {
        let rule =
            UserRule { header: HeaderName::from_static("x-user-id"), claim: None, salt: "s".to_owned() };
        let known = KnownUser::new(&Arc::new(rule), TestUser::of("s", b"ann"));
        let mut headers = HeaderMap::new();
        assert!(!known.sent(&headers));
        for (user, expected) in [("ann", true), ("bob", false), ("", false)] {
            headers.insert("x-user-id", user.parse().unwrap());
            assert_eq!(known.sent(&headers), expected);
        }
    }
}
