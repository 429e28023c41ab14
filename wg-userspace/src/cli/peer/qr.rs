//! A text as a QR code for terminals.

use qrcode::{Color, EcLevel, QrCode, types::QrError};
use zeroize::Zeroizing;

/// Light modules around a code (ISO/IEC 18004, 9.1).
const QUIET: usize = 4;
/// White on black by numbers that no theme changes.
const COLOURS: &str = "\x1b[38;5;231;48;5;16m";
const RESET: &str = "\x1b[0m";

/// A QR code of half blocks: what is printed is light, what is left blank is dark. Readers see it right on
/// a dark terminal; with colours, on any.
///
/// # Errors
/// If the text is too long for a QR code.
pub fn code(text: &str, has_colours: bool) -> Result<Zeroizing<String>, QrError> {
    let code = QrCode::with_error_correction_level(text, EcLevel::L)?;
    let width = code.width();
    let modules = Zeroizing::new(
        code.into_colors().iter().map(|color| *color == Color::Dark).collect::<Vec<_>>(),
    );
    let is_dark = |x: usize, y: usize| {
        let inside = QUIET..QUIET + width;
        inside.contains(&x) && inside.contains(&y) && modules[(y - QUIET) * width + (x - QUIET)]
    };
    let side = width + 2 * QUIET;
    let (start, end) = if has_colours { (COLOURS, RESET) } else { ("", "") };
    let line_len = 3 * side + start.len() + end.len() + 1;
    let mut lines = Zeroizing::new(String::with_capacity(line_len * side.div_ceil(2)));
    for y in (0..side).step_by(2) {
        lines.push_str(start);
        for x in 0..side {
            lines.push(match (is_dark(x, y), is_dark(x, y + 1)) {
                (false, false) => '█',
                (false, true) => '▀',
                (true, false) => '▄',
                (true, true) => ' ',
            });
        }
        lines.push_str(end);
        lines.push('\n');
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Brightness of the modules as a terminal shows them.
    fn seen(shown: &str, has_colours: bool) -> Vec<Vec<u8>> {
        let mut rows = Vec::new();
        for line in shown.lines() {
            let line = match has_colours {
                true => line.strip_prefix(COLOURS).unwrap().strip_suffix(RESET).unwrap(),
                false => line,
            };
            let halves = line.chars().map(|block| match block {
                '█' => (255, 255),
                '▀' => (255, 0),
                '▄' => (0, 255),
                ' ' => (0, 0),
                other => panic!("{other}"),
            });
            let (upper, lower): (Vec<u8>, Vec<u8>) = halves.unzip();
            rows.extend([upper, lower]);
        }
        rows
    }

    fn read(rows: &[Vec<u8>]) -> String {
        const SCALE: usize = 3;
        let (width, height) = (rows[0].len() * SCALE, rows.len() * SCALE);
        let mut image = rqrr::PreparedImage::prepare_from_greyscale(width, height, |x, y| {
            rows[y / SCALE][x / SCALE]
        });
        let grids = image.detect_grids();
        assert_eq!(grids.len(), 1);
        grids[0].decode().unwrap().1
    }

    #[test]
    fn a_reader_reads_what_was_written() {
        let short = "[Interface]\n".to_owned();
        let long = format!("{short}Address = 10.9.0.2/24, fd09::2/64\n# ü\n").repeat(12);
        for text in [short, long] {
            for has_colours in [false, true] {
                let shown = code(&text, has_colours).unwrap();
                let rows = seen(&shown, has_colours);
                assert_eq!(read(&rows), text);
                let is_light = |row: &Vec<u8>| row.iter().all(|&seen| seen == 255);
                assert!(rows[..QUIET].iter().all(is_light), "a quiet zone above");
                assert!(rows[rows.len() - QUIET..].iter().all(is_light), "and below");
                for row in &rows {
                    assert!(
                        row[..QUIET]
                            .iter()
                            .chain(&row[row.len() - QUIET..])
                            .all(|&seen| seen == 255)
                    );
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(code(&"x".repeat(2953), false).is_ok());
        assert!(code(&"x".repeat(2954), false).is_err());
    }
}
