// The theme: light, dark or the system's; saved in the browser.
import { useState } from "preact/hooks";

export type Theme = "system" | "light" | "dark";
const NAME = "trackstar-theme";

function stored(): Theme {
  try {
    const found = localStorage.getItem(NAME);
    return found === "light" || found === "dark" ? found : "system";
  } catch {
    return "system";
  }
}

function apply(theme: Theme): void {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

export function applyStoredTheme(): void {
  apply(stored());
}

export function useTheme(): [Theme, (theme: Theme) => void] {
  const [theme, set] = useState(stored);
  return [
    theme,
    (next) => {
      set(next);
      apply(next);
      try {
        localStorage.setItem(NAME, next);
      } catch {
        // Without storage, the choice lasts until the page is closed.
      }
    },
  ];
}
