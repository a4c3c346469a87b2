//! Draws the layers of a store as a tree: what each one is, its size on the host, and what is built on it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use super::size;
use crate::control::types::TreeNode;

/// From this column on a layer with one child is drawn right above it, so that a chain of a thousand snapshots does not
/// walk off the right edge.
const STRAIGHT_FROM_COLUMN: usize = 48;

/// The drawing, one line a layer. Works on any list, also one with parents that are not in it.
pub fn draw(layers: &[TreeNode]) -> String {
    let known: BTreeSet<&str> = layers.iter().map(|node| node.layer.as_str()).collect();
    let mut children: BTreeMap<&str, Vec<&TreeNode>> = BTreeMap::new();
    let mut roots = Vec::new();
    for node in layers {
        match node
            .parent
            .as_deref()
            .filter(|parent| known.contains(parent))
        {
            Some(parent) => children.entry(parent).or_default().push(node),
            None => roots.push(node),
        }
    }

    let mut out = String::new();
    // A stack instead of recursion: a chain may have thousands of layers.
    // (layer, what stands before its branch, whether it is a root, whether it is the last of its parent)
    let mut stack: Vec<(&TreeNode, String, bool, bool)> = Vec::new();
    stack.extend(
        roots
            .into_iter()
            .rev()
            .map(|root| (root, String::new(), true, true)),
    );
    while let Some((node, before, root, last)) = stack.pop() {
        let branch = match (root, last) {
            (true, _) => "",
            (false, true) => "\u{2514}\u{2500} ",
            (false, false) => "\u{251c}\u{2500} ",
        };
        let _ = writeln!(out, "{before}{branch}{}", describe(node));
        let below = children.remove(node.layer.as_str()).unwrap_or_default();
        let straight = below.len() == 1 && before.chars().count() >= STRAIGHT_FROM_COLUMN;
        let before_below = match (root, last) {
            (true, _) => before,
            (false, true) if straight => before,
            (false, true) => before + "   ",
            (false, false) => before + "\u{2502}  ",
        };
        let count = below.len();
        for (index, child) in below.into_iter().enumerate().rev() {
            stack.push((child, before_below.clone(), false, index + 1 == count));
        }
    }
    out
}

/// What a layer is, in a line.
fn describe(node: &TreeNode) -> String {
    let mut names: Vec<String> = Vec::new();
    if let Some(base) = &node.base {
        names.push(format!("base {base}"));
    }
    if !node.snapshots.is_empty() {
        let named: Vec<_> = node.snapshots.iter().map(ToString::to_string).collect();
        names.push(format!("snapshot {}", named.join(", ")));
    }
    if let Some(volume) = &node.active_of {
        names.push(format!("volume {volume}"));
    }
    if names.is_empty() {
        let short: String = node.layer.chars().take(8).collect();
        names.push(format!("layer {short} (unnamed)"));
    }
    format!(
        "{} [{} of {}]",
        names.join(", "),
        size::show(node.allocated_bytes),
        size::show(node.size_bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::timestamp::Timestamp;
    use crate::control::types::SnapshotRef;

    /// A layer without a name.
    fn layer(name: &str, parent: Option<&str>) -> TreeNode {
        TreeNode {
            layer: name.into(),
            parent: parent.map(Into::into),
            base: None,
            snapshots: Vec::new(),
            active_of: None,
            size_bytes: 1 << 30,
            allocated_bytes: 4096,
            created: Timestamp(0),
        }
    }

    #[test]
    fn branches_are_drawn_below_their_layer() {
        let snapshot = |volume: &str, snapshot: &str| SnapshotRef {
            volume: volume.into(),
            snapshot: snapshot.into(),
        };
        let layers = [
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
                ..layer("c", Some("b"))
            },
            layer("0123456789", Some("b")),
            TreeNode {
                active_of: Some("web".into()),
                ..layer("e", Some("0123456789"))
            },
            TreeNode {
                active_of: Some("data".into()),
                ..layer("f", None)
            },
            layer("orphan", Some("not there")),
        ];
        let expected = "\
base /img/debian.img [4 KiB of 1 GiB]
\u{2514}\u{2500} snapshot web@s1, web@again [4 KiB of 1 GiB]
\u{20}  \u{251c}\u{2500} volume clone [4 KiB of 1 GiB]
\u{20}  \u{2514}\u{2500} layer 01234567 (unnamed) [4 KiB of 1 GiB]
\u{20}     \u{2514}\u{2500} volume web [4 KiB of 1 GiB]
volume data [4 KiB of 1 GiB]
layer orphan (unnamed) [4 KiB of 1 GiB]
";
        assert_eq!(draw(&layers), expected);
    }

    #[test]
    fn a_long_chain_stays_on_the_screen() {
        let name = |index: usize| format!("layer-{index}");
        let layers: Vec<_> = (0..5000usize)
            .map(|index| layer(&name(index), index.checked_sub(1).map(name).as_deref()))
            .collect();
        let drawing = draw(&layers);
        assert_eq!(drawing.lines().count(), 5000);
        assert!(drawing.lines().all(|line| line.chars().count() < 100));
    }
}
