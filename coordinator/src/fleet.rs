//! Who is what in a cluster, from what its nodes report. Pure: sessions and `now` come in, roles and reasons go out.
//!
//! The role is the server's own word (in recovery or not), never a guess from silence. A node whose report is older
//! than [`REPORT_AGE_MAX`] or whose server does not answer is fit for nothing, and neither is one that has only just
//! connected; whoever asks for a backup waits for its first report. Two nodes out of recovery on one timeline
//! are not ranked here: the writer rule of [`crate::writer`] refuses the wrong one's WAL, and no backup is taken from
//! either until one of them is gone. A standby that went on along a timeline past the place where the primary's line left it
//! follows a dead line: a backup of it would be one of what was lost.

use std::time::Duration;

use postgres_format::timeline_history::TimelineHistory;
use postgres_format::{Lsn, Timeline};
use repository::name::NodeName;

/// A report older than this says nothing about the present.
pub const REPORT_AGE_MAX: Duration = Duration::from_secs(30);

/// When a node last said how it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard {
    /// It is connected and reported this long ago.
    Ago(Duration),
    /// It is connected, and its first report is outstanding.
    NotYet,
    /// It is not connected, and was last heard this long ago.
    Gone(Duration),
}

/// What one node last said about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeState {
    /// Its name.
    pub node: NodeName,
    /// When it said so.
    pub heard: Heard,
    /// Whether its server accepts connections.
    pub server_reachable: bool,
    /// Why its agent has no session with it; empty if it has one or did not say.
    pub server_problem: String,
    /// Whether its server is in recovery.
    pub in_recovery: bool,
    /// Its current timeline; absent while unknown.
    pub timeline: Option<Timeline>,
    /// Last written or replayed LSN.
    pub lsn: Lsn,
    /// The node that writes its timeline, where that is another one, so that its WAL is refused.
    pub foreign_to: Option<NodeName>,
    /// Of a primary: its `full_page_writes`, when known.
    pub full_page_writes: Option<bool>,
    /// Whether its agent knows backups of the hybrid shape.
    pub knows_hybrid: bool,
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Out of recovery: it writes WAL.
    Primary,
    /// In recovery.
    Standby,
    /// Silent, or its server does not answer.
    Unknown,
}

impl Role {
    /// The word for people and for JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Standby => "standby",
            Self::Unknown => "unknown",
        }
    }
}

/// Where a base backup may be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// A standby if one is fit, else the primary.
    #[default]
    PreferStandby,
    /// A standby only.
    Standby,
    /// The primary only.
    Primary,
}

/// How a standby's files may be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShapeWish {
    /// By the standby alone where that is possible, else with its primary.
    #[default]
    Auto,
    /// By the standby alone.
    Standby,
    /// With its primary.
    Hybrid,
}

/// How a backup is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shape {
    /// The primary starts and stops it, and its files are copied.
    Primary,
    /// The standby starts and stops it, and its files are copied.
    Standby,
    /// The primary starts and stops it, and nearly all files are the standby's.
    Hybrid {
        /// The primary.
        primary: NodeName,
    },
}

/// The node that takes a backup, in which shape, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The node.
    pub node: NodeName,
    /// The shape.
    pub shape: Shape,
    /// Why, for people.
    pub reason: String,
}

/// No node is fit; one line a node that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no node of the cluster is fit for a base backup: {}", why.join("; "))]
pub struct NoFitNode {
    /// Why each node is not fit, for people.
    pub why: Vec<String>,
}

/// The line of timelines that the primary is on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// The primary.
    pub primary: NodeName,
    /// Its timeline.
    pub timeline: Timeline,
    /// The history of that; absent for the first timeline, and as long as no store tells it.
    pub history: Option<TimelineHistory>,
}

impl Line {
    /// Why a standby is not on its way along this line, if it is certain or cannot be told.
    pub fn left(&self, node: &NodeState) -> Option<String> {
        let timeline = node.timeline.filter(|timeline| *timeline < self.timeline)?;
        let Some(history) = &self.history else {
            return Some(format!(
                "is on timeline {timeline}, and no store tells where timeline {} of the primary {} left it",
                self.timeline, self.primary
            ));
        };
        let on_way = history.end_of(timeline).is_some_and(|fork| node.lsn <= fork);
        (!on_way).then(|| format!("is at {} on timeline {timeline}{}", node.lsn, self.told_left(timeline)))
    }

    /// What is said of a position behind the end of a timeline on this line.
    pub fn told_left(&self, timeline: Timeline) -> String {
        let (newer, primary) = (self.timeline, &self.primary);
        match self.history.as_ref().and_then(|history| history.end_of(timeline)) {
            Some(fork) => {
                format!(", which timeline {newer} of the primary {primary} left at {fork}: what follows there is lost")
            }
            None => format!(", from which timeline {newer} of the primary {primary} does not come"),
        }
    }
}

/// The role of a node.
pub fn role(node: &NodeState) -> Role {
    let fresh = matches!(node.heard, Heard::Ago(age) if age <= REPORT_AGE_MAX);
    if !fresh || !node.server_reachable {
        Role::Unknown
    } else if node.in_recovery {
        Role::Standby
    } else {
        Role::Primary
    }
}

/// Whether a node has connected and not said yet how it is, so that judging now would be too early.
pub fn awaits_report(nodes: &[NodeState]) -> bool {
    nodes.iter().any(|node| node.heard == Heard::NotYet)
}

/// The one primary of the cluster: the node out of recovery on the highest timeline; none when two share it, or when its
/// WAL is refused.
pub fn primary(nodes: &[NodeState]) -> Option<&NodeState> {
    let highest = nodes.iter().filter(|node| role(node) == Role::Primary).filter_map(|node| node.timeline).max()?;
    let mut on_highest = nodes.iter().filter(|node| role(node) == Role::Primary && node.timeline == Some(highest));
    match (on_highest.next(), on_highest.next()) {
        (Some(only), None) if only.foreign_to.is_none() => Some(only),
        _ => None,
    }
}

/// Chooses node and shape of a base backup; `wanted` names a node, else the source decides and the node with the highest LSN
/// wins (least WAL to replay), the name breaking ties. `line` is the primary's.
///
/// # Errors
/// [`NoFitNode`] with a reason for each node looked at.
pub fn choose(
    nodes: &[NodeState],
    wanted: Option<&NodeName>,
    (source, wish): (Source, ShapeWish),
    line: Option<&Line>,
) -> Result<Choice, NoFitNode> {
    let looked_at: Vec<&NodeState> = nodes.iter().filter(|node| wanted.is_none_or(|name| *name == node.node)).collect();
    if looked_at.is_empty() {
        let text = wanted.map_or_else(
            || "no agent of this cluster is connected".to_owned(),
            |name| format!("no agent of node {name} is connected"),
        );
        return Err(NoFitNode { why: vec![text] });
    }
    let mut why = Vec::new();
    let mut fit: Vec<(&NodeState, Shape, &str)> = Vec::new();
    for node in looked_at {
        let source = if wanted.is_some() { Source::PreferStandby } else { source };
        let unfit = unfit(node, nodes, source, line).map_or(Ok(()), Err);
        match unfit.and_then(|()| shape(node, nodes, wish)) {
            Err(reason) => why.push(format!("{}: {reason}", node.node)),
            Ok((shape, because)) => fit.push((node, shape, because)),
        }
    }
    fit.sort_by(|(a, shape_a, _), (b, shape_b, _)| {
        let standby_first = (*shape_a == Shape::Primary).cmp(&(*shape_b == Shape::Primary));
        standby_first.then(b.lsn.cmp(&a.lsn)).then(a.node.cmp(&b.node))
    });
    let Some((best, shape, because)) = fit.into_iter().next() else { return Err(NoFitNode { why }) };
    let reason = match (wanted, &shape, source) {
        (Some(_), _, _) => format!("{} {} was asked for by name", role(best).word(), best.node),
        (None, Shape::Standby | Shape::Hybrid { .. }, _) => {
            format!("standby {} at {} spares the primary", best.node, best.lsn)
        }
        (None, _, Source::Primary) => format!("primary {} as asked", best.node),
        (None, _, _) if why.is_empty() => format!("primary {}, there is no standby", best.node),
        (None, _, _) => format!("primary {}, no standby is fit ({})", best.node, why.join("; ")),
    };
    let reason = match &shape {
        Shape::Primary => reason,
        Shape::Standby => format!("{reason}, and starts and stops it itself{because}"),
        Shape::Hybrid { primary } => format!("{reason}; hybrid: primary {primary} starts and stops it, {because}"),
    };
    Ok(Choice { node: best.node.clone(), shape, reason })
}

/// In which shape a fit node takes a backup and why, or why in none.
///
/// A standby alone asks least of the primary, and follows it over a failover. But the pages that it copies are torn unless
/// `full_page_writes` was on at the primary for the whole time, and only a backup that the primary itself has started forces
/// that.
fn shape(node: &NodeState, nodes: &[NodeState], wish: ShapeWish) -> Result<(Shape, &'static str), String> {
    if role(node) == Role::Primary {
        return match wish {
            ShapeWish::Auto => Ok((Shape::Primary, "")),
            ShapeWish::Standby | ShapeWish::Hybrid => {
                Err("is the primary, and the shape that was asked for takes a standby".to_owned())
            }
        };
    }
    // Without a primary no standby is fit.
    let Some(primary) = primary(nodes) else { return Err("is a standby, and no primary is connected".to_owned()) };
    let torn = primary.full_page_writes == Some(false);
    let unknowing = [node, primary].into_iter().find(|node| !node.knows_hybrid);
    let hybrid = |because| match unknowing {
        None => Ok((Shape::Hybrid { primary: primary.node.clone() }, because)),
        Some(old) => Err(format!("the agent of {} is of an older version and knows no hybrid backups", old.node)),
    };
    match wish {
        ShapeWish::Hybrid => hybrid("as asked"),
        ShapeWish::Auto if torn => {
            hybrid("because full_page_writes is off there, which only a backup of its own overrides")
                .map_err(|reason| format!("full_page_writes is off on the primary {}, and {reason}", primary.node))
        }
        ShapeWish::Standby if torn => Err(format!(
            "full_page_writes is off on the primary {}, so that only the hybrid shape is possible",
            primary.node
        )),
        ShapeWish::Standby => Ok((Shape::Standby, ", as asked")),
        ShapeWish::Auto => Ok((Shape::Standby, "")),
    }
}

/// Why an agent has no session with its server, by what it said about that.
pub fn server_trouble(problem: &str) -> String {
    match problem {
        "" => "its server does not accept connections".to_owned(),
        problem => format!("its agent cannot ask its server: {problem}"),
    }
}

/// Why a node cannot take a backup now; `None` when it can.
fn unfit(node: &NodeState, nodes: &[NodeState], source: Source, line: Option<&Line>) -> Option<String> {
    match (role(node), source) {
        (Role::Unknown, _) => Some(match node.heard {
            Heard::NotYet => "connected, its first report is outstanding".to_owned(),
            Heard::Gone(age) => format!("not connected for {} s", age.as_secs()),
            Heard::Ago(age) if age > REPORT_AGE_MAX => format!("silent for {} s", age.as_secs()),
            Heard::Ago(_) => server_trouble(&node.server_problem),
        }),
        (Role::Primary, Source::Standby) => Some("is the primary, and a standby was asked for".to_owned()),
        (Role::Standby, Source::Primary) => Some("is a standby, and the primary was asked for".to_owned()),
        (Role::Primary, _) => match primary(nodes) {
            Some(only) if only.node == node.node => None,
            Some(only) => Some(format!("is out of recovery on an older timeline than {}", only.node)),
            None => Some(match &node.foreign_to {
                Some(writer) => format!(
                    "its WAL is refused, because node {writer} writes its timeline; adopt it if it is to go on from there"
                ),
                None => "two nodes are out of recovery on one timeline".to_owned(),
            }),
        },
        // Without a primary nobody can switch WAL for it, and its backup would wait for the last segment for ever.
        (Role::Standby, _) => match primary(nodes) {
            Some(primary) if node.timeline > primary.timeline => {
                Some(format!("is on a later timeline than the primary {}", primary.node))
            }
            Some(_) => line.and_then(|line| line.left(node)),
            None => Some("is a standby, and no primary is connected to switch WAL for it".to_owned()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, in_recovery: bool, timeline: u32, lsn: u64) -> NodeState {
        NodeState {
            node: name.parse().unwrap(),
            heard: Heard::Ago(Duration::from_secs(1)),
            server_reachable: true,
            server_problem: String::new(),
            in_recovery,
            timeline: Timeline::new(timeline),
            lsn: Lsn::new(lsn),
            foreign_to: None,
            full_page_writes: (!in_recovery).then_some(true),
            knows_hybrid: true,
        }
    }

    fn chosen(nodes: &[NodeState], wanted: Option<&str>, source: Source) -> Result<String, String> {
        let wanted = wanted.map(|name| name.parse().unwrap());
        choose(nodes, wanted.as_ref(), (source, ShapeWish::Auto), None)
            .map(|c| c.node.to_string())
            .map_err(|e| e.to_string())
    }

    #[test]
    fn a_standby_spares_the_primary() {
        let nodes = [node("a", false, 1, 900), node("b", true, 1, 700), node("c", true, 1, 800)];
        assert_eq!(chosen(&nodes, None, Source::PreferStandby).unwrap(), "c");
        assert_eq!(chosen(&nodes, None, Source::Standby).unwrap(), "c");
        assert_eq!(chosen(&nodes, None, Source::Primary).unwrap(), "a");
        assert_eq!(chosen(&nodes, Some("b"), Source::PreferStandby).unwrap(), "b");
        assert_eq!(chosen(&nodes[..1], None, Source::PreferStandby).unwrap(), "a");
    }

    #[test]
    fn unfit_nodes_are_named_with_the_reason() {
        let mut silent = node("b", true, 1, 700);
        silent.heard = Heard::Ago(Duration::from_secs(90));
        let mut down = node("c", true, 1, 700);
        down.server_reachable = false;
        let mut shut_out = node("f", true, 1, 700);
        shut_out.server_reachable = false;
        shut_out.server_problem = "the server refuses the login of role x".to_owned();
        let mut new = node("d", true, 1, 700);
        new.heard = Heard::NotYet;
        let mut gone = node("e", true, 1, 700);
        gone.heard = Heard::Gone(Duration::from_secs(7));
        let nodes = [node("a", false, 1, 900), silent, down, new, gone, shut_out];
        assert!(awaits_report(&nodes) && !awaits_report(&nodes[..3]));
        let refused = chosen(&nodes, None, Source::Standby).unwrap_err();
        let expected = [
            "b: silent for 90 s",
            "f: its agent cannot ask its server: the server refuses the login of role x",
            "c: its server does not accept",
            "a: is the primary",
            "d: connected, its first report is outstanding",
            "e: not connected for 7 s",
        ];
        for part in expected {
            assert!(refused.contains(part), "{part} in {refused}");
        }
        assert_eq!(chosen(&nodes, None, Source::PreferStandby).unwrap(), "a");
        assert!(chosen(&nodes, Some("x"), Source::PreferStandby).unwrap_err().contains("node x"));
        assert!(chosen(&[], None, Source::PreferStandby).unwrap_err().contains("no agent"));
        let alone = [node("s", true, 1, 1)];
        assert!(chosen(&alone, None, Source::PreferStandby).unwrap_err().contains("no primary"));
    }

    #[test]
    fn a_node_whose_wal_is_refused_is_nobody_even_alone() {
        let clone = NodeState { foreign_to: Some("a".parse().unwrap()), ..node("b", false, 1, 700) };
        let nodes = [clone, node("c", true, 1, 600)];
        assert_eq!(primary(&nodes), None);
        for wanted in [None, Some("b")] {
            let refused = chosen(&nodes, wanted, Source::PreferStandby).unwrap_err();
            assert!(refused.contains("b: its WAL is refused, because node a writes"), "{refused}");
        }
    }

    #[test]
    fn two_primaries_on_one_timeline_are_nobody() {
        let nodes = [node("a", false, 1, 900), node("b", false, 1, 700)];
        assert_eq!(primary(&nodes), None);
        assert!(chosen(&nodes, None, Source::PreferStandby).unwrap_err().contains("two nodes"));
        let after_promotion = [node("a", false, 1, 900), node("b", false, 2, 700)];
        assert_eq!(primary(&after_promotion).unwrap().node.as_str(), "b");
        assert!(chosen(&after_promotion, Some("a"), Source::PreferStandby).unwrap_err().contains("older timeline"));
    }

    #[test]
    fn a_standby_past_the_fork_is_on_a_dead_line() {
        let two = Timeline::new(2).unwrap();
        let history = TimelineHistory::parse(two, b"1\t0/500\tno recovery target specified\n").ok();
        let line = |history| Line { primary: "b".parse().unwrap(), timeline: two, history };
        let chosen = |standby: NodeState, line: &Line| {
            let nodes = [node("b", false, 2, 0x900), standby];
            choose(&nodes, None, (Source::PreferStandby, ShapeWish::Auto), Some(line)).unwrap()
        };
        let of = |standby: NodeState| chosen(standby, &line(history.clone()));
        assert_eq!(of(node("c", true, 2, 0x800)).node.as_str(), "c");
        // It has not come to the fork yet.
        assert_eq!(of(node("c", true, 1, 0x500)).node.as_str(), "c");
        let past = of(node("c", true, 1, 0x501));
        assert_eq!(past.node.as_str(), "b");
        assert!(
            past.reason.contains("c: is at 0/501 on timeline 1, which timeline 2 of the primary b left at 0/500"),
            "{past:?}"
        );
        let unknown = chosen(node("c", true, 1, 0x300), &line(None));
        assert!(unknown.reason.contains("no store tells where timeline 2"), "{unknown:?}");
        let nodes = [node("b", false, 2, 0x900), node("c", true, 1, 0x501)];
        let auto = (Source::PreferStandby, ShapeWish::Auto);
        let named = choose(&nodes, Some(&"c".parse().unwrap()), auto, Some(&line(history.clone())));
        assert!(named.unwrap_err().to_string().contains("what follows there is lost"));
    }
    #[test]
    fn the_shape_follows_the_wish_and_what_is_possible() {
        let writes = |full_page_writes| NodeState { full_page_writes, ..node("a", false, 1, 900) };
        let old = |state: NodeState| NodeState { knows_hybrid: false, ..state };
        let check =
            |nodes: &[NodeState], wanted: Option<&str>, wish: ShapeWish, expected: Result<(Shape, &str), &str>| {
                let wanted = wanted.map(|name| name.parse().unwrap());
                let found = choose(nodes, wanted.as_ref(), (Source::PreferStandby, wish), None);
                match (found, expected) {
                    (Ok(choice), Ok((shape, part))) => {
                        assert_eq!(choice.shape, shape, "{}", choice.reason);
                        assert!(choice.reason.contains(part), "{part} in {}", choice.reason);
                    }
                    (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{part} in {error}"),
                    (found, expected) => panic!("{found:?}, not {expected:?}"),
                }
            };
        let hybrid = || Shape::Hybrid { primary: "a".parse().unwrap() };
        let b = || node("b", true, 1, 800);
        for said in [Some(true), None] {
            let nodes = [writes(said), b()];
            check(
                &nodes,
                None,
                ShapeWish::Auto,
                Ok((Shape::Standby, "standby b at 0/320 spares the primary, and starts")),
            );
            check(&nodes, None, ShapeWish::Standby, Ok((Shape::Standby, "itself, as asked")));
            check(&nodes, None, ShapeWish::Hybrid, Ok((hybrid(), "hybrid: primary a starts and stops it, as asked")));
            check(&nodes, Some("b"), ShapeWish::Hybrid, Ok((hybrid(), "standby b was asked for by name; hybrid")));
            check(&nodes, Some("a"), ShapeWish::Auto, Ok((Shape::Primary, "by name")));
            check(&nodes, Some("a"), ShapeWish::Hybrid, Err("a: is the primary, and the shape"));
        }
        let torn = [writes(Some(false)), b()];
        check(&torn, None, ShapeWish::Auto, Ok((hybrid(), "because full_page_writes is off there")));
        check(&torn, None, ShapeWish::Standby, Err("so that only the hybrid shape is possible"));
        for nodes in [[old(writes(Some(false))), b()], [writes(Some(false)), old(b())]] {
            check(&nodes, None, ShapeWish::Auto, Ok((Shape::Primary, "of an older version and knows no hybrid")));
            check(&nodes, None, ShapeWish::Hybrid, Err("of an older version and knows no hybrid"));
        }
        check(&[old(writes(Some(true))), b()], None, ShapeWish::Auto, Ok((Shape::Standby, "itself")));
    }
}
