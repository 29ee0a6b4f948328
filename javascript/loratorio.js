// The panel's line about the LoRAs in the prompt, kept true while the prompt is edited, pasted or filled by the page.
// For Gradio 3 (A1111, reForge) and Gradio 4 (Forge, Forge Neo). Uses the WebUI's onUiLoaded, onAfterUiUpdate and opts.
// LoRA names come from anywhere: they enter the page as text nodes only.
"use strict";

(function() {
    // The same sentence stands in loratorio/webui/panel.py, for the moment before this file has run.
    const NONE_YET = "No LoRA in the prompt yet. Add one, as in <lora:name:0.8>, or the pictures stay the WebUI's own.";
    const ONE_ONLY = "With a single LoRA, only re-centring changes the picture.";
    const ALWAYS_ONLY = "These act in every pass: there is nothing to compose.";
    const NONE_FOLDED = "no LoRA yet";
    const STYLES_TOO = "LoRAs of the chosen styles come on top.";
    const ROLES = ["content", "style", "always"];
    const ROLES_HELP = "content: where it fits, patch by patch. style: everywhere, in the passes of all the others. always: in every pass, never "
        + "composed (LCM, Lightning, Turbo and the like).";

    function element(tag, className, text) {
        const made = document.createElement(tag);
        made.className = className;
        made.textContent = text;
        return made;
    }

    function chip(lora, index, textarea) {
        const made = element("span", "loratorio-lora", (lora.pool ? "pool " : "") + lora.name + " ");
        made.append(element("b", "", lora.unet));
        if (lora.text !== lora.unet) {
            made.append(element("span", "loratorio-text-strength", " text " + lora.text));
        }
        if (!lora.pool) {
            made.append(roleMenu(lora, index, textarea));
        }
        return made;
    }

    /** A drop-down that shows the LoRA's role and writes another one into its tag. */
    function roleMenu(lora, index, textarea) {
        const menu = element("select", "loratorio-role", "");
        menu.setAttribute("aria-label", "Role of " + lora.name);
        menu.title = ROLES_HELP;
        for (const role of ROLES.includes(lora.role) ? ROLES : [lora.role, ...ROLES]) {
            menu.append(new Option(role, role, false, role === lora.role));
        }
        // The role that the LoRA has anyway needs no writing.
        menu.addEventListener("change", () => loratorioTags.write(textarea, index, "role", menu.value === lora.own ? undefined : menu.value));
        return menu;
    }

    /** A list of LoRAs under its heading. */
    function listed(heading, loras, textarea) {
        return [
            element("span", "loratorio-heading", heading),
            ...loras.map((lora, index) => chip(lora, index, textarea)),
        ];
    }

    /** The LoRAs of a textarea's prompt with their roles: what is written, else "always" for those that Python recognised. */
    function rolesOf(textarea, line) {
        let speed = [];
        try {
            speed = JSON.parse(line.dataset.speed ?? "[]");
        } catch {
            // A list that cannot be read recognises nothing.
        }
        return loratorioTags.read(textarea?.value ?? "").map(({start, end, ...lora}) => {
            const own = !lora.pool && speed.includes(lora.name) ? "always" : "content";
            return {...lora, own, role: lora.pool ? "content" : lora.options.role?.trim().toLowerCase() ?? own};
        });
    }

    function textareaOf(id) {
        return gradioApp().querySelector(`#${id} textarea`);
    }

    /** Where the hires pass has a prompt of its own, if it is on. */
    function hiresPrompt(tab) {
        const on = tab === "txt2img" && gradioApp().querySelector("#txt2img_hr-checkbox input")?.checked;
        return on ? textareaOf("hires_prompt") : null;
    }

    const shown = {};

    /** Bring the line of a tab up to date; touches the page only where something changed. */
    function refresh(tab) {
        const line = gradioApp().querySelector(`#loratorio_${tab}_loras`);
        const prompt = textareaOf(`${tab}_prompt`);
        if (!line || !prompt) {
            return;
        }
        const hiresArea = hiresPrompt(tab);
        const loras = rolesOf(prompt, line);
        const hires = rolesOf(hiresArea, line);
        const styles = gradioApp().querySelector(`#${tab}_styles .token`) !== null;
        const state = JSON.stringify([loras, hires, styles]);
        if (shown[tab]?.line === line && shown[tab].state === state) {
            return;
        }
        shown[tab] = {line, state};

        const composed = loras.filter(lora => lora.role !== "always");
        const alone = composed.length === 1 && !composed[0].pool && !hires.length;
        const parts = loras.length ? listed(alone && loras.length === 1 ? "One LoRA" : "Will compose", loras, prompt) : [];
        if (hires.length) {
            parts.push(...listed("Hires pass", hires, hiresArea));
        }
        let remark = alone ? ONE_ONLY : "";
        if (!composed.length && !hires.length) {
            remark = loras.length ? ALWAYS_ONLY : NONE_YET;
        }
        for (const text of [remark, styles ? STYLES_TOO : ""]) {
            if (text) {
                parts.push(element("span", "loratorio-remark", text));
            }
        }
        // Blanks for those who copy the line or have it read out; the page itself does not show them.
        line.replaceChildren(...parts.flatMap(part => [part, " "]));
        loratorioPlaces.show(tab, prompt, loras);
        const all = loras.map(lora => `${lora.name} ${lora.unet}`);
        folded(tab).textContent = all.length ? all.join(" · ") : NONE_FOLDED;
    }

    /** The place for the same in few words in the panel's title, where it is seen while the panel is folded. */
    function folded(tab) {
        const title = gradioApp().querySelector(`#loratorio_${tab} .label-wrap`);
        let place = title?.querySelector(".loratorio-folded");
        if (!place) {
            place = element("span", "loratorio-folded", "");
            title?.insertBefore(place, title.lastElementChild);
        }
        return place;
    }

    /** Have `changed` called for what is typed into a textarea and for what the page writes into it (paste, send to, styles). */
    function follow(textarea, changed) {
        if (!textarea || textarea.loratorioFollowed) {
            return;
        }
        textarea.loratorioFollowed = true;
        textarea.addEventListener("input", changed);
        // Gradio sets .value and tells nobody.
        const value = Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, "value");
        Object.defineProperty(textarea, "value", {
            configurable: true,
            enumerable: value.enumerable,
            get() {
                return value.get.call(this);
            },
            set(text) {
                value.set.call(this, text);
                changed();
            },
        });
    }

    /** What each preset does, where one looks for it: Gradio's buttons know no tooltips. */
    function explainPresets(tab) {
        const line = gradioApp().querySelector(`#loratorio_${tab}_loras`);
        for (const [name, help] of Object.entries(JSON.parse(line?.dataset.presets ?? "{}"))) {
            const button = gradioApp().querySelector(`#loratorio_${tab}_preset_${name}`);
            if (button && button.title !== help) {
                button.title = help;
            }
        }
    }

    function update() {
        for (const tab of ["txt2img", "img2img"]) {
            follow(textareaOf(`${tab}_prompt`), () => refresh(tab));
            refresh(tab);
            explainPresets(tab);
        }
        follow(textareaOf("hires_prompt"), () => refresh("txt2img"));
    }

    onUiLoaded(update);
    onAfterUiUpdate(update);
})();
