//! Bars, drawn as SVG: groups of them, one below the other, with the spread of the samples.
//!
//! All that the reports need of a library for plots is a scale and some rectangles, which is less than
//! choosing fonts for one; colours and text are the page's own, so that they follow its light or dark.

use std::fmt::Write as _;

use super::{html::escape, report::number};

/// What is drawn beside each other.
#[derive(Clone, Debug)]
pub struct Group {
    /// Its name.
    pub title: String,
    /// From the top to the bottom.
    pub bars: Vec<Bar>,
}

/// A bar.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Who it is, for whoever points at it.
    pub title: String,
    /// By which the page chooses its colour.
    pub class: String,
    /// How long it is.
    pub value: f64,
    /// Between what the samples lie.
    pub spread: (f64, f64),
    /// What stands beside it.
    pub label: String,
    /// Whether the scale has to have room for it; others are cut where it ends.
    pub counts: bool,
}

const WIDTH: f64 = 820.0;
/// Where bars begin, and how long the longest is; the rest is for its label.
const LEFT: f64 = 210.0;
const LENGTH: f64 = 480.0;
const BAR: f64 = 14.0;
const STEP: f64 = 17.0;
const GAP: f64 = 12.0;
const AXIS: f64 = 22.0;

/// Draws groups, in a unit.
pub fn bars(title: &str, unit: &str, groups: &[Group]) -> String {
    let all = || groups.iter().flat_map(|group| &group.bars);
    let counting = all().filter(|bar| bar.counts).map(|bar| bar.spread.1.max(bar.value));
    let max = match counting.fold(0.0, f64::max) {
        // Nobody counts: then all do.
        max if max <= 0.0 => all().map(|bar| bar.spread.1.max(bar.value)).fold(0.0, f64::max),
        max => max,
    };
    let tick = tick(max);
    let end = (max / tick).ceil().max(1.0) * tick;
    let x = |value: f64| LEFT + (value / end).clamp(0.0, 1.0) * LENGTH;
    let bar_count: usize = groups.iter().map(|group| group.bars.len()).sum();
    let height = bar_count as f64 * STEP + groups.len() as f64 * GAP + AXIS;

    let mut svg = String::new();
    let mut say = |line: String| writeln!(svg, "{line}").expect("a string takes everything");
    say(format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">",
        escape(title)
    ));
    let bottom = height - AXIS;
    let tick_count = (end / tick).round() as u32;
    for step in 0..=tick_count {
        let value = f64::from(step) * tick;
        let (at, text) = (x(value), number(value, if tick < 1.0 { 2 } else { 0 }));
        let unit = if step == tick_count { format!(" {}", escape(unit)) } else { String::new() };
        say(format!(
            "<line class=\"grid\" x1=\"{at:.1}\" y1=\"0\" x2=\"{at:.1}\" y2=\"{bottom:.1}\"/>"
        ));
        let y = height - 6.0;
        say(format!("<text x=\"{at:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{text}{unit}</text>"));
    }
    let mut y = GAP / 2.0;
    for Group { title, bars } in groups {
        let middle = y + bars.len() as f64 * STEP / 2.0 + 2.0;
        let title = escape(title);
        let before = LEFT - 8.0;
        say(format!("<text x=\"{before}\" y=\"{middle:.1}\" text-anchor=\"end\">{title}</text>"));
        for bar in bars {
            let (from, to) = (x(bar.spread.0), x(bar.spread.1));
            let (width, across) = ((x(bar.value) - LEFT).max(1.0), y + BAR / 2.0);
            let is_cut = bar.value > end;
            say(format!("<g><title>{}</title>", escape(&bar.title)));
            say(format!(
                "<rect class=\"{}\" x=\"{LEFT}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR}\"/>",
                escape(&bar.class)
            ));
            if !is_cut {
                say(format!(
                    "<path class=\"spread\" d=\"M{from:.1} {across:.1}H{to:.1}M{from:.1} {:.1}v6M{to:.1} {:.1}v6\"/>",
                    across - 3.0,
                    across - 3.0
                ));
            }
            let (at, label) = (x(bar.spread.1.max(bar.value)) + 6.0, escape(&bar.label));
            let arrow = if is_cut { "→ " } else { "" };
            say(format!("<text x=\"{at:.1}\" y=\"{:.1}\">{arrow}{label}</text></g>", y + 11.0));
            y += STEP;
        }
        y += GAP;
    }
    say("</svg>".to_owned());
    svg
}

/// A step of 1, 2 or 5 of some power of ten, of which three to seven reach `max`: more have no room for their
/// numbers.
fn tick(max: f64) -> f64 {
    if !(max > 0.0 && max.is_finite()) {
        return 1.0;
    }
    let power = 10f64.powf(max.log10().floor());
    let steps = [2.0, 1.0, 0.5, 0.2].map(|step| step * power);
    steps.into_iter().find(|step| max / step >= 2.499).unwrap_or(power)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bar(value: f64, counts: bool) -> Bar {
        Bar {
            title: "<who>".to_owned(),
            class: "c0".to_owned(),
            value,
            spread: (value, value),
            label: value.to_string(),
            counts,
        }
    }

    fn draw(bars: Vec<Bar>) -> String {
        super::bars("a \"plot\"", "Gbit/s", &[Group { title: "up & down".to_owned(), bars }])
    }

    /// Widths of all bars.
    fn widths(svg: &str) -> Vec<f64> {
        let rects = svg.lines().filter(|line| line.starts_with("<rect"));
        rects
            .map(|rect| {
                rect.split("width=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap()
            })
            .collect()
    }

    #[test]
    fn steps_are_round_and_few() {
        let steps =
            [(1.0, 0.2), (1.84, 0.5), (2.65, 1.0), (8.0, 2.0), (294.0, 100.0), (16438.0, 5000.0)];
        for (max, step) in steps {
            assert!((tick(max) / step - 1.0).abs() < 1e-9, "{max}: {}", tick(max));
        }
        for none in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(tick(none), 1.0);
        }
        for max in 1..5000 {
            let count = f64::from(max) / tick(f64::from(max));
            assert!((2.4..=6.3).contains(&count), "{max}: {count}");
        }
    }

    #[test]
    fn lengths_are_as_the_values() {
        let widths = widths(&draw(vec![bar(1.0, true), bar(2.0, true), bar(0.0, true)]));
        assert!((widths[1] / widths[0] - 2.0).abs() < 0.01, "{widths:?}");
        assert_eq!(widths[2], 1.0, "what is nothing is seen all the same");
    }

    #[test]
    fn the_scale_is_of_those_that_count_and_others_are_cut() {
        let svg = draw(vec![bar(2.0, true), bar(20.0, false)]);
        let widths = widths(&svg);
        assert_eq!(widths, [LENGTH, LENGTH]);
        assert!(svg.contains(">→ 20</text>"), "{svg}");
        assert!(!svg.contains("→ 2<"), "{svg}");
        // Alone, it counts.
        assert!(!draw(vec![bar(20.0, false)]).contains('→'));
    }

    #[test]
    fn texts_are_texts() {
        let svg = draw(vec![bar(1.0, true)]);
        assert!(svg.contains("&lt;who&gt;") && svg.contains("up &amp; down"), "{svg}");
        assert!(svg.contains("aria-label=\"a &quot;plot&quot;\""), "{svg}");
    }
}
