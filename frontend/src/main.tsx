// Entry point of the page.
import { render } from "preact";
import { App } from "./app";
import { followLocation } from "./state";
import { applyStoredTheme } from "./theme";

applyStoredTheme();
followLocation();
const root = document.getElementById("app");
if (root) render(<App />, root);
