//! Draws the layers of a store as a tree: what each one is, its size on the host, what is built on it, and what jobs do to
//! it.

use std::collections::HashMap;
use std::fmt::Write;

use super::size;
use crate::control::types::{Direction, Job, JobKind, JobState, Tree, TreeNode, VolumeType};

/// From this column on the largest branch over a layer is drawn right below it, so that a chain of a thousand snapshots
/// does not walk off the right edge.
const STRAIGHT_FROM_COLUMN: usize = 48;
/// Siblings with nothing over them, one after the other, that are drawn one by one.
const LEAVES_MAX: usize = 16;
/// The first of more of them that are drawn.
const LEAVES_FIRST: usize = 8;
/// The last of more of them that are drawn.
const LEAVES_LAST: usize = 2;

/// What a line is about.
#[derive(Clone, Copy, Debug)]
enum Line {
    /// A layer, by its place in the list.
    Layer(usize),
    /// So many siblings that are left out, and the bytes that they take.
    Others(usize, u64),
}

/// A line that is still to be drawn.
#[derive(Debug)]
struct Pending {
    /// What it is about.
    line: Line,
    /// What stands before its branch.
    before: String,
    /// Whether nothing is below it.
    root: bool,
    /// Whether it is the last branch of its parent.
    last: bool,
}

/// The layers with what lies over each.
struct Forest<'a> {
    /// As they came.
    nodes: &'a [TreeNode],
    /// For each, those directly over it.
    children: Vec<Vec<usize>>,
    /// For each, how many lie over it, and itself.
    weight: Vec<usize>,
    /// What is written behind a layer, by its place.
    remarks: HashMap<usize, String>,
    /// Whether every layer is drawn.
    all: bool,
}

/// The drawing, one line a layer; long lists of siblings are shortened unless `all` are wanted. Works on any list, also one
/// with parents that are not in it.
pub fn draw(tree: &Tree, all: bool) -> String {
    let nodes = &tree.layers;
    let known: HashMap<&str, usize> = nodes
        .iter()
        .enumerate()
        .map(|(place, node)| (node.layer.as_str(), place))
        .collect();
    let mut forest = Forest {
        nodes,
        children: vec![Vec::new(); nodes.len()],
        weight: vec![1; nodes.len()],
        remarks: remarks(tree),
        all,
    };
    let parents: Vec<Option<usize>> = nodes
        .iter()
        .map(|node| known.get(node.parent.as_deref()?).copied())
        .collect();
    let mut roots = Vec::new();
    for (place, parent) in parents.iter().enumerate() {
        match parent.and_then(|parent| forest.children.get_mut(parent)) {
            Some(siblings) => siblings.push(place),
            None => roots.push(place),
        }
    }
    // Parents come first, so that from behind each is whole before it is counted to its own.
    for (place, parent) in parents.iter().enumerate().rev() {
        let weight = forest.weight(place);
        if let Some(sum) = parent.and_then(|parent| forest.weight.get_mut(parent)) {
            *sum += weight;
        }
    }
    forest.draw(roots)
}

impl Forest<'_> {
    /// How many layers lie over one, and itself.
    fn weight(&self, place: usize) -> usize {
        self.weight.get(place).copied().unwrap_or(1)
    }

    /// Draws what lies over these roots.
    fn draw(&self, roots: Vec<usize>) -> String {
        let mut out = String::new();
        // A stack instead of recursion: a chain may have thousands of layers.
        let mut stack: Vec<Pending> = Vec::new();
        let lines = self.shortened(&roots).into_iter().rev();
        stack.extend(lines.map(|line| Pending {
            line,
            before: String::new(),
            root: true,
            last: true,
        }));
        while let Some(Pending {
            line,
            before,
            root,
            last,
        }) = stack.pop()
        {
            let branch = match (root, last) {
                (true, _) => "",
                (false, true) => "\u{2514}\u{2500} ",
                (false, false) => "\u{251c}\u{2500} ",
            };
            let _ = writeln!(out, "{before}{branch}{}", self.describe(line));
            let Line::Layer(place) = line else {
                continue;
            };
            let mut over = self.children.get(place).cloned().unwrap_or_default();
            let deep = !root && before.chars().count() >= STRAIGHT_FROM_COLUMN;
            let straight = deep && last;
            if deep
                && let Some(largest) = (0..over.len())
                    .max_by_key(|index| over.get(*index).map(|place| self.weight(*place)))
            {
                let place = over.remove(largest);
                over.push(place);
            }
            let before_over = match (root, last) {
                (true, _) => before.clone(),
                (false, true) => format!("{before}   "),
                (false, false) => format!("{before}\u{2502}  "),
            };
            let lines = self.shortened(&over);
            let count = lines.len();
            for (index, line) in lines.into_iter().enumerate().rev() {
                let last = index + 1 == count;
                let before = if last && straight {
                    before.clone()
                } else {
                    before_over.clone()
                };
                stack.push(Pending {
                    line,
                    before,
                    root: false,
                    last,
                });
            }
        }
        out
    }

    /// Siblings as lines: of many that have nothing over them only the first and the last.
    fn shortened(&self, siblings: &[usize]) -> Vec<Line> {
        let is_leaf = |place: &usize| self.weight(*place) == 1 && !self.remarks.contains_key(place);
        let mut lines = Vec::new();
        for run in siblings.chunk_by(|a, b| is_leaf(a) && is_leaf(b)) {
            let hidden = run.len().saturating_sub(LEAVES_FIRST + LEAVES_LAST);
            if self.all || run.len() <= LEAVES_MAX {
                lines.extend(run.iter().copied().map(Line::Layer));
                continue;
            }
            let (first, rest) = run.split_at(LEAVES_FIRST);
            let (middle, last) = rest.split_at(hidden);
            let sizes = middle.iter().filter_map(|place| self.nodes.get(*place));
            let bytes = sizes.fold(0u64, |sum, node| sum.saturating_add(node.allocated_bytes));
            lines.extend(first.iter().copied().map(Line::Layer));
            lines.push(Line::Others(hidden, bytes));
            lines.extend(last.iter().copied().map(Line::Layer));
        }
        lines
    }

    /// A line without its branch.
    fn describe(&self, line: Line) -> String {
        match line {
            Line::Others(count, bytes) => {
                let bytes = size::show(bytes);
                format!("... {count} more [{bytes}]; --all draws them")
            }
            Line::Layer(place) => {
                let Some(node) = self.nodes.get(place) else {
                    return String::new();
                };
                let remark = self.remarks.get(&place).map_or("", String::as_str);
                let sizes = (
                    size::show(node.allocated_bytes),
                    size::show(node.size_bytes),
                );
                let bad = match node.bad_bytes {
                    0 => String::new(),
                    bytes => format!(", {} damaged", size::show(bytes)),
                };
                format!("{} [{} of {}{bad}]{remark}", name(node), sizes.0, sizes.1)
            }
        }
    }
}

/// What a layer is.
pub fn name(node: &TreeNode) -> String {
    let mut names: Vec<String> = Vec::new();
    if let Some(base) = &node.base {
        names.push(format!("base {base}"));
    }
    if !node.snapshots.is_empty() {
        let named: Vec<_> = node.snapshots.iter().map(ToString::to_string).collect();
        names.push(format!("snapshot {}", named.join(", ")));
    }
    if let Some(volume) = &node.active_of {
        names.push(match node.active_type {
            None | Some(VolumeType::Normal) => format!("current state of {volume}"),
            Some(kind) => format!("current state of {volume} ({kind})"),
        });
    }
    if names.is_empty() && !node.content_of.is_empty() {
        names.push(format!("content of {}", node.content_of.join(", ")));
    }
    if names.is_empty() {
        let short: String = node.layer.chars().take(8).collect();
        names.push(format!("layer {short} (unnamed)"));
    }
    names.join(", ")
}

/// What jobs do, each written behind the layer whose data moves.
fn remarks(tree: &Tree) -> HashMap<usize, String> {
    let mut ends: HashMap<u64, (usize, usize)> = HashMap::new();
    for (place, node) in tree.layers.iter().enumerate() {
        if let Some(id) = node.job {
            ends.entry(id).or_insert((place, place)).1 = place;
        }
    }
    let jobs = tree.jobs.iter();
    jobs.filter_map(|job| {
        let (lower, upper) = ends.get(&job.id)?;
        let place = match (job.kind, job.way) {
            (JobKind::Flatten | JobKind::Import | JobKind::IntoBase, _) => upper,
            (_, Direction::Down) => upper,
            _ => lower,
        };
        Some((*place, format!(" {}", remark(job))))
    })
    .collect()
}

/// What a job does to a layer, and how far it is.
fn remark(job: &Job) -> String {
    let what = match (job.kind, job.way) {
        (JobKind::Merge, Direction::Down) => "merging down",
        (JobKind::Merge, _) => "merging up",
        (JobKind::PushDown, _) => "copying into its children",
        (JobKind::Flatten, _) => "flattening",
        (JobKind::Import, _) => "importing",
        (JobKind::IntoBase, _) => "merging into the base",
        (JobKind::Scrub, _) => "scrubbing",
    };
    let percent = job.percent();
    match job.state {
        JobState::Running => format!("{what}, {percent} %"),
        JobState::Queued => format!("{what}, waiting for its turn"),
        JobState::Paused => format!("{what}, paused at {percent} %"),
        JobState::Failed => format!("{what} failed at {percent} %"),
        JobState::Cancelled => format!("{what} was cancelled at {percent} %"),
        JobState::Done => format!("{what}, done"),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::control::timestamp::Timestamp;
    use crate::control::types::{NodeKind, SnapshotRef};

    /// A layer without a name.
    fn layer(name: &str, parent: Option<&str>) -> TreeNode {
        TreeNode {
            layer: name.into(),
            parent: parent.map(Into::into),
            kind: NodeKind::Unnamed,
            base: None,
            snapshots: Vec::new(),
            active_of: None,
            active_type: None,
            content_of: Vec::new(),
            job: None,
            size_bytes: 1 << 30,
            allocated_bytes: 4096,
            bad_bytes: 0,
            created: Timestamp(0),
        }
    }

    /// A tree without jobs.
    fn tree(layers: Vec<TreeNode>) -> Tree {
        Tree {
            layers,
            jobs: Vec::new(),
        }
    }

    /// A job that is 43 % done.
    fn job(id: u64, kind: JobKind, way: Direction) -> Job {
        Job {
            id,
            kind,
            way,
            ..Job::sample()
        }
    }

    #[test]
    fn branches_are_drawn_below_their_layer() {
        let snapshot = |volume: &str, snapshot: &str| SnapshotRef {
            volume: volume.into(),
            snapshot: snapshot.into(),
        };
        let layers = vec![
            TreeNode {
                base: Some("/img/debian.img".into()),
                ..layer("a", None)
            },
            TreeNode {
                snapshots: vec![snapshot("web", "s1"), snapshot("web", "again")],
                ..layer("b", Some("a"))
            },
            TreeNode {
                active_of: Some("clone".into()),
                active_type: Some(VolumeType::Normal),
                ..layer("c", Some("b"))
            },
            TreeNode {
                job: Some(1),
                ..layer("0123456789", Some("b"))
            },
            TreeNode {
                active_of: Some("web".into()),
                job: Some(1),
                ..layer("e", Some("0123456789"))
            },
            TreeNode {
                content_of: vec!["kiosk".into()],
                job: Some(2),
                ..layer("g", None)
            },
            TreeNode {
                active_of: Some("kiosk".into()),
                active_type: Some(VolumeType::Immutable),
                job: Some(2),
                ..layer("f", Some("g"))
            },
            layer("orphan", Some("not there")),
        ];
        let expected = "\
base /img/debian.img [4 KiB of 1 GiB]
\u{2514}\u{2500} snapshot web@s1, web@again [4 KiB of 1 GiB]
\u{20}  \u{251c}\u{2500} current state of clone [4 KiB of 1 GiB]
\u{20}  \u{2514}\u{2500} layer 01234567 (unnamed) [4 KiB of 1 GiB] merging up, 43 %
\u{20}     \u{2514}\u{2500} current state of web [4 KiB of 1 GiB]
content of kiosk [4 KiB of 1 GiB]
\u{2514}\u{2500} current state of kiosk (immutable) [4 KiB of 1 GiB] flattening, 43 %
layer orphan (unnamed) [4 KiB of 1 GiB]
";
        let jobs = vec![
            job(1, JobKind::Merge, Direction::Up),
            job(2, JobKind::Flatten, Direction::Copy),
        ];
        assert_eq!(draw(&Tree { layers, jobs }, false), expected);
    }

    #[test]
    fn data_that_comes_down_is_marked_at_the_upper_layer() {
        let with_job = |node: TreeNode| TreeNode {
            job: Some(1),
            ..node
        };
        let layers = vec![
            with_job(layer("lower", None)),
            with_job(layer("upper", Some("lower"))),
        ];
        let jobs = vec![Job {
            state: JobState::Paused,
            ..job(1, JobKind::Merge, Direction::Down)
        }];
        let drawing = draw(&Tree { layers, jobs }, false);
        let marked: Vec<_> = drawing
            .lines()
            .filter(|line| line.ends_with(" merging down, paused at 43 %"))
            .collect();
        assert_eq!(marked.len(), 1, "{drawing}");
        assert!(marked.iter().all(|line| line.contains("upper")));
    }

    #[test]
    fn a_long_list_of_siblings_is_shortened_unless_all_are_wanted() {
        let mut layers = vec![layer("root", None)];
        layers.extend((0..10_000).map(|n| layer(&format!("{n:08}"), Some("root"))));
        let tree = tree(layers);
        let start = Instant::now();
        let drawing = draw(&tree, false);
        assert_eq!(drawing.lines().count(), 1 + LEAVES_FIRST + 1 + LEAVES_LAST);
        assert!(
            drawing.contains("\u{251c}\u{2500} ... 9990 more [39 MiB]; --all draws them\n"),
            "{drawing}"
        );
        assert!(drawing.contains("layer 00009999"), "the newest is shown");
        assert_eq!(draw(&tree, true).lines().count(), 10_001);
        assert!(start.elapsed().as_millis() < 1000);
    }

    #[test]
    fn a_long_chain_stays_on_the_screen() {
        let name = |index: usize| format!("layer-{index}");
        let layers: Vec<_> = (0..10_000usize)
            .map(|index| layer(&name(index), index.checked_sub(1).map(name).as_deref()))
            .collect();
        let drawing = draw(&tree(layers), false);
        assert_eq!(drawing.lines().count(), 10_000);
        assert!(drawing.lines().all(|line| line.chars().count() < 100));
    }

    #[test]
    fn a_long_chain_with_a_clone_at_each_layer_stays_on_the_screen() {
        let mut layers = vec![layer("l0", None)];
        for index in 1..5_000 {
            let parent = format!("l{}", index - 1);
            layers.push(layer(&format!("l{index}"), Some(&parent)));
            layers.push(layer(&format!("c{index}"), Some(&parent)));
        }
        let start = Instant::now();
        let drawing = draw(&tree(layers), true);
        assert_eq!(drawing.lines().count(), 9_999);
        assert!(drawing.lines().all(|line| line.chars().count() < 120));
        assert!(start.elapsed().as_millis() < 1000);
    }
}
