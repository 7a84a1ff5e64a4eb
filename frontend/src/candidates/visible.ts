// Finds control, bidirectional and zero-width characters, so that the page shows their numbers instead.

const HIDDEN =
  "\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u034f\\u061c\\u115f\\u1160\\u17b4\\u17b5\\u180b-\\u180f" +
  "\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\u3164\\ufe00-\\ufe0e\\ufeff\\uffa0\\ufff0-\\ufffb\\u{e0000}-\\u{e0fff}";
const RUN = new RegExp(`([${HIDDEN}])\\1*`, "gu");
const ANY = new RegExp(`[${HIDDEN}]`, "u");

/** Visible text, or a run of `count` equal hidden characters, shown by number. */
export type Shown = { text: string } | { code: string; name: string; count: number };

const NAMES: Record<string, string> = {
  "U+0000": "null", "U+0008": "backspace", "U+000D": "carriage return", "U+001B": "escape", "U+007F": "delete",
  "U+00AD": "soft hyphen", "U+061C": "Arabic letter mark", "U+200B": "zero-width space",
  "U+200C": "zero-width non-joiner", "U+200D": "zero-width joiner", "U+200E": "left-to-right mark",
  "U+200F": "right-to-left mark", "U+2028": "line separator", "U+2029": "paragraph separator",
  "U+202A": "left-to-right embedding", "U+202B": "right-to-left embedding", "U+202C": "pop directional formatting",
  "U+202D": "left-to-right override", "U+202E": "right-to-left override", "U+2060": "word joiner",
  "U+2066": "left-to-right isolate", "U+2067": "right-to-left isolate", "U+2068": "first strong isolate",
  "U+2069": "pop directional isolate", "U+FEFF": "byte order mark",
};

function codeOf(character: string): string {
  return `U+${(character.codePointAt(0) ?? 0).toString(16).toUpperCase().padStart(4, "0")}`;
}

/** The text in parts; at most `most` hidden runs are numbered, further ones become U+FFFD. */
export function parts(text: string, most = 500): Shown[] {
  if (!ANY.test(text)) return text ? [{ text }] : [];
  const found: Shown[] = [];
  let end = 0;
  for (const match of text.matchAll(RUN)) {
    if (found.length > 2 * most) {
      found.push({ text: text.slice(end).replace(RUN, "\ufffd") });
      return found;
    }
    if (match.index > end) found.push({ text: text.slice(end, match.index) });
    const character = match[1] ?? "";
    const code = codeOf(character);
    const count = match[0].length / Math.max(1, character.length);
    found.push({ code, name: NAMES[code] ?? "control character", count });
    end = match.index + match[0].length;
  }
  if (end < text.length) found.push({ text: text.slice(end) });
  return found;
}

/** The text as one string for titles, labels and tables, with hidden characters as their numbers. */
export function plain(text: string): string {
  if (!ANY.test(text)) return text;
  return text.replace(RUN, (run: string, character: string) => {
    const count = run.length / character.length;
    return count > 1 ? `[${codeOf(character)} ×${count}]` : `[${codeOf(character)}]`;
  });
}

/** One line of at most `longest` characters. */
export function brief(text: string, longest: number): string {
  const line = plain(text.slice(0, 4 * longest)).replace(/\s+/g, " ").trim();
  const characters = [...line];
  return characters.length > longest ? `${characters.slice(0, longest - 1).join("")}…` : line;
}
