// The panel's line about the LoRAs in the prompt, kept up to date while the prompt is edited, pasted or filled by the page.
// For Gradio 3 (A1111, reForge) and Gradio 4 (Forge, Forge Neo). Uses the WebUI's onUiLoaded, onAfterUiUpdate and opts.
// LoRA names come from anywhere: they enter the page as text nodes only.
"use strict";

(function() {
    const ALWAYS_ONLY = "These act in every pass, so there is nothing to compose.";
    const NONE_FOLDED = "no LoRA yet";
    const OFF = "Off. If ticked, it composes";
    const STYLES_TOO = "The LoRAs of the selected styles are added.";

    /** What Python calls things, from the panel's line: roles, a help for them, sentences. */
    let names = {roles: []};

    // A tag that is certainly readable: a name, options, plain numbers.
    const PLAIN = /^<\w+:[^:]+(:(?!te=|unet=|dyn=)\w+=[^=:]*|:\s*[-+]?(\d+\.?\d*|\.\d+)\s*)*>$/;

    function element(tag, className, text) {
        const made = document.createElement(tag);
        made.className = className;
        made.textContent = text;
        return made;
    }

    function chip(lora, textarea) {
        const made = element("span", "loratorio-lora", (lora.pool ? "pool " : "") + lora.name + " ");
        const wrong = found.wrong[lora.tag];
        if (wrong) {
            made.classList.add("loratorio-wrong");
            made.append(element("span", "loratorio-found", wrong));
            return made;
        }
        made.append(element("b", "", lora.unet));
        const known = found.of(lora);
        if (known) {
            made.append(element("span", "loratorio-found", " " + known));
        }
        if (lora.text !== lora.unet) {
            made.append(element("span", "loratorio-text-strength", " text " + lora.text));
        }
        if (!lora.pool) {
            made.append(roleMenu(lora, textarea));
        }
        made.classList.toggle("loratorio-wrong", !names.roles.includes(lora.role) || found.missing.has(lora.name) && !lora.pool);
        return made;
    }

    /** A drop-down that shows the LoRA's role and writes another one into its tag. */
    function roleMenu(lora, textarea) {
        const menu = element("select", "loratorio-role", "");
        menu.id = `loratorio_role_${textarea.parentElement?.closest("[id]")?.id}_${lora.numbers[0]}`;
        menu.setAttribute("aria-label", "Role of " + lora.name);
        menu.title = names.roles_help;
        const isRole = names.roles.includes(lora.role);
        menu.setAttribute("aria-invalid", String(!isRole));
        for (const role of isRole ? names.roles : [lora.role, ...names.roles]) {
            menu.append(new Option(names.roles.includes(role) ? role : `${role}: unknown role`, role, false, role === lora.role));
        }
        // The LoRA's default role need not be written.
        const written = () => menu.value === lora.own ? undefined : menu.value;
        menu.addEventListener("change", () => loratorioTags.write(textarea, lora.numbers, "role", written(), menu.closest("p")));
        return menu;
    }

    /** Which of the prompts' LoRAs and pools the WebUI has, requested when new ones appear. */
    const found = {
        pools: {},
        wrong: {},
        missing: new Set(),
        asked: new Set(),
        reads: {txt2img: {}, img2img: {}},

        /** A remark about a missing LoRA, or how many LoRAs a pool has; nothing while that is unknown. */
        of(lora) {
            if (!lora.pool) {
                return this.missing.has(lora.name) ? "not found" : "";
            }
            const count = this.pools[lora.name];
            return typeof count === "number" ? `${count} LoRA${count === 1 ? "" : "s"}` : count ?? "";
        },

        /**
         * Request those that were not requested yet, and which words of the prompt its LoRAs with places do not read; `done` is called
         * when the answer has arrived.
         */
        async ask(tab, loras, prompt, done) {
            const key = lora => (lora.pool ? "pool:" : "lora:") + lora.name;
            const isNew = text => !this.asked.has(text);
            const fresh = loras.filter(lora => isNew(key(lora)));
            const tags = loras.flatMap(lora => lora.tags).filter(tag => !PLAIN.test(tag) && isNew(tag));
            const places = loras.filter(lora => lora.options.at !== undefined).length;
            const isNewPrompt = places > 1 && this.reads[tab].prompt !== prompt;
            if (!fresh.length && !tags.length && !isNewPrompt) {
                return;
            }
            if (isNewPrompt) {
                this.reads[tab] = {prompt, sentence: ""};
            }
            [...fresh.map(key), ...tags].forEach(text => this.asked.add(text));
            const names = pool => fresh.filter(lora => lora.pool === pool).map(lora => lora.name);
            try {
                const answer = await fetch("./loratorio/found", {
                    method: "POST",
                    headers: {"Content-Type": "application/json"},
                    body: JSON.stringify({loras: names(false), pools: names(true), tags, ...(isNewPrompt ? {prompt} : {})}),
                });
                if (!answer.ok) {
                    return;
                }
                const {missing, pools, wrong, reads} = await answer.json();
                missing.forEach(name => this.missing.add(name));
                Object.assign(this.pools, pools);
                Object.assign(this.wrong, wrong);
                if (isNewPrompt && this.reads[tab].prompt === prompt) {
                    this.reads[tab].sentence = reads;
                }
                done();
            } catch {
                // Without an answer, the line does not mention it.
            }
        },

        /** Files may have come or gone: ask again from now on. */
        forget() {
            this.asked.clear();
            this.missing.clear();
            this.reads = {txt2img: {}, img2img: {}};
        },
    };

    /** A list of LoRAs under its heading. */
    function listed(heading, loras, textarea) {
        return [
            element("span", "loratorio-heading", heading),
            ...loras.map(lora => chip(lora, textarea)),
        ];
    }

    const isPlaced = lora => lora.options.at !== undefined || lora.options.words !== undefined;

    /** A sentence if LoRAs have places or own words and the chosen method does not support them, or nothing. */
    function placeless(tab, loras) {
        const method = gradioApp().querySelector(`#loratorio_${tab}_method input`)?.value;
        const able = names.with_places;
        return !method || able.includes(method) || !loras.some(isPlaced) ? ""
            : `Places and own words do not work with ${method}: the job will stop. Choose ${able.slice(0, -1).join(", ")} or ${able[able.length - 1]}.`;
    }

    /**
     * The LoRAs with the numbers of their tags; those that several tags name in one place as one, at the strength to which they add up.
     *
     * `repeats`: how the WebUI adds up the strengths (see `sum_of_tags` in loratorio/hosts).
     */
    function joined(loras, repeats) {
        const sum = some => String(Number((repeats === "different" ? [...new Set(some)] : some).reduce((one, other) => one + other)
            .toPrecision(12)));
        const byKey = new Map();
        loras.forEach((lora, number) => {
            const own = loras.filter(each => !each.pool && each.name === lora.name);
            const {unet, text} = repeats === "last" && !own.some(isPlaced) ? own[own.length - 1] ?? lora : lora;
            const isOne = lora.pool || found.wrong[lora.tag] || Number.isNaN(Number(unet) + Number(text));
            const key = JSON.stringify([isOne ? number : lora.name, lora.options.at, lora.options.words]);
            const before = byKey.get(key);
            const every = {unet: [...before?.every.unet ?? [], Number(unet)], text: [...before?.every.text ?? [], Number(text)]};
            byKey.set(key, before ? {
                ...before,
                options: Object.assign(Object.create(null), lora.options, before.options),
                unet: sum(every.unet),
                text: sum(every.text),
                every,
                tags: [...before.tags, lora.tag],
                numbers: [...before.numbers, number],
            } : {...lora, unet, text, every, tags: [lora.tag], numbers: [number]});
        });
        return [...byKey.values()];
    }

    /** The LoRAs of a textarea's prompt with their roles: what is written, else "always" for those that Python recognised. */
    function rolesOf(textarea) {
        const loras = loratorioTags.read(textarea?.value ?? "").map(({start, end, ...lora}) => lora);
        return joined(loras, names.repeats).map(lora => {
            const own = !lora.pool && names.speed.includes(lora.name) ? "always" : "content";
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

    /** The panel's tick box: the WebUI's own in an accordion's title, or a plain one. */
    function tickBox(tab) {
        return gradioApp().querySelector(`#loratorio_${tab}-visible-checkbox`)
            ?? gradioApp().querySelector(`#loratorio_${tab}-checkbox input`);
    }

    function knobBox(tab, knob) {
        return gradioApp().querySelector(`#loratorio_${tab}_${knob} input[type=checkbox]`);
    }

    /** A number on the page, by its element's id; `other` where there is none. */
    function numberOf(id, other) {
        return Number(gradioApp().querySelector(`#${id} input[type=number]`)?.value || other);
    }

    /** What a step costs in plain steps, by question; null while Python has not answered. */
    const costs = {};

    function showCost(tab, count) {
        const place = gradioApp().querySelector(`#loratorio_${tab}_cost .loratorio-cost`);
        if (!place) {
            return;
        }
        const part = tab === "img2img" ? Math.min(1, numberOf("img2img_denoising_strength", 1)) : 1;
        const steps = Math.max(1, Math.round(part * numberOf(`${tab}_steps`, 20)));
        const cfg = numberOf(`${tab}_cfg_scale`, 7);
        const question = JSON.stringify({values: JSON.parse(place.dataset.values), count, steps, cfg});
        if (count && costs[question] === undefined) {
            costs[question] = null;
            askCost(question).then(() => refresh(tab));
        }
        if (count && costs[question] === null) {
            return; // what was true before stands until the answer comes
        }
        const text = count ? `With ${count} LoRA${count === 1 ? "" : "s"}, a step costs about ${costs[question].toFixed(1)} times as much as a plain one.` : "";
        if (place.textContent !== text) {
            place.textContent = text;
        }
    }

    async function askCost(question) {
        const answer = await fetch("./loratorio/cost", {method: "POST", headers: {"Content-Type": "application/json"}, body: question});
        costs[question] = answer.ok ? await answer.json() : null;
    }

    /** A knob that changes the cost has changed. */
    window.loratorioCost = (tab, values) => {
        gradioApp().querySelector(`#loratorio_${tab}_cost .loratorio-cost`).dataset.values = JSON.stringify(values);
        refresh(tab);
    };

    const shown = {};

    /** Bring the line of a tab up to date; touches the page only where something changed. */
    function refresh(tab) {
        const line = gradioApp().querySelector(`#loratorio_${tab}_loras`);
        const prompt = textareaOf(`${tab}_prompt`);
        if (!line || !prompt) {
            return;
        }
        names = JSON.parse(line.dataset.names);
        const hiresArea = hiresPrompt(tab);
        const loras = rolesOf(prompt);
        const hires = rolesOf(hiresArea);
        const styles = gradioApp().querySelector(`#${tab}_styles .token`) !== null;
        const on = tickBox(tab)?.checked ?? true;
        const composed = loras.filter(lora => lora.role !== "always" && !found.wrong[lora.tag]);
        showCost(tab, composed.filter(lora => !lora.pool && Number(lora.unet) !== 0 && !found.missing.has(lora.name)).length);
        const every = [...loras, ...hires];
        const text = loratorioTags.withoutComments(prompt.value);
        found.ask(tab, every, text, () => refresh(tab));
        const reads = knobBox(tab, "own_words")?.checked && found.reads[tab].prompt === text ? found.reads[tab].sentence : "";
        const said = [placeless(tab, every), reads, ...every.map(lora => found.wrong[lora.tag] ?? found.of(lora))];
        const state = JSON.stringify([loras, hires, styles, on, said]);
        if (shown[tab]?.line === line && shown[tab].state === state) {
            return;
        }
        shown[tab] = {line, state};

        const alone = composed.length === 1 && !composed[0].pool && !hires.length;
        const heading = !on ? OFF : alone && loras.length === 1 ? "One LoRA" : "Will compose";
        const parts = loras.length ? listed(heading, loras, prompt) : [];
        if (hires.length) {
            parts.push(...listed("Hires pass", hires, hiresArea));
        }
        let remark = alone && !isPlaced(composed[0]) ? names.one_only : "";
        if (!composed.length && !hires.length) {
            remark = loras.length ? ALWAYS_ONLY : names.none_yet;
        }
        for (const text of [remark, said[0], reads, styles ? STYLES_TOO : ""]) {
            if (text) {
                parts.push(element("span", "loratorio-remark", text));
            }
        }
        // Spaces for copying and screen readers; the page itself does not show them.
        loratorioTags.keepingFocus(() => line.replaceChildren(...parts.flatMap(part => [part, " "])));
        line.onkeydown = event => loratorioTags.undoKey(event, prompt);
        loratorioPlaces.show(tab, prompt, loras, names);
        const all = loras.map(lora => `${lora.name} ${lora.unet}`);
        folded(tab).textContent = all.length ? all.join(" · ") : NONE_FOLDED;
    }

    /** The short version in the panel's title, visible while the panel is folded. */
    function folded(tab) {
        const title = gradioApp().querySelector(`#loratorio_${tab} .label-wrap`);
        let place = title?.querySelector(".loratorio-folded");
        if (!place) {
            place = element("span", "loratorio-folded", "");
            title?.insertBefore(place, title.lastElementChild);
        }
        return place;
    }

    /** Call `changed` when the user types or ticks, and when the page itself writes (paste, send to, styles). */
    function follow(field, property, changed) {
        if (!field || field.loratorioFollowed) {
            return;
        }
        field.loratorioFollowed = true;
        field.addEventListener("input", changed);
        field.addEventListener("change", changed);
        // Gradio sets the property without an event.
        const own = Object.getOwnPropertyDescriptor(Object.getPrototypeOf(field), property);
        Object.defineProperty(field, property, {
            configurable: true,
            enumerable: own.enumerable,
            get() {
                return own.get.call(this);
            },
            set(value) {
                own.set.call(this, value);
                changed();
            },
        });
    }

    /**
     * Once the panel is open, its arrow and its tick box are independent: folding it must not switch it off.
     *
     * The WebUI itself separates them at the first click on the box. A synthetic event does the same without ticking it.
     */
    function partArrowAndBox(tab) {
        const box = gradioApp().querySelector(`#loratorio_${tab}-visible-checkbox`);
        if (box && !box.loratorioParted && gradioApp().querySelector(`#loratorio_${tab} > .label-wrap.open`)) {
            box.loratorioParted = true;
            box.dispatchEvent(new Event("click"));
        }
    }

    /** Tick the box when the page is opened, if the settings say so: only in the page, so that API calls are not affected. */
    function tickAtStart(tab) {
        const box = tickBox(tab);
        if (!box || box.loratorioStarted || typeof opts === "undefined" || opts.loratorio_ticked === undefined) {
            return;
        }
        box.loratorioStarted = true;
        if (opts.loratorio_ticked && !box.checked) {
            box.click();
        }
    }

    function explain(id, help) {
        const element = gradioApp().querySelector(`#${id}`);
        if (element && element.title !== help) {
            element.title = help;
        }
    }

    /** A tooltip on each preset: Gradio's choices have none. */
    function explainPresets(tab) {
        const helps = names.presets ?? {};
        for (const label of gradioApp().querySelectorAll(`#loratorio_${tab}_preset label`)) {
            const help = helps[label.textContent.trim()];
            if (help && label.title !== help) {
                label.title = help;
            }
        }
    }

    /** Our components with a tooltip, found once among the page's many. */
    let explained = [];

    /** The knobs' tooltips, which the WebUI sets only once: greying a knob out, or back, replaces its element. */
    function explainKnobs() {
        if (!explained.length) {
            explained = (window.gradio_config?.components ?? []).map((each) => each.props).filter(
                (props) => props?.webui_tooltip && props.elem_id?.startsWith("loratorio_"));
        }
        for (const {elem_id: id, webui_tooltip: help} of explained) {
            explain(id, help);
        }
    }

    function update() {
        explainKnobs();
        for (const tab of ["txt2img", "img2img"]) {
            follow(textareaOf(`${tab}_prompt`), "value", () => refresh(tab));
            follow(tickBox(tab), "checked", () => refresh(tab));
            follow(knobBox(tab, "own_words"), "checked", () => refresh(tab));
            for (const side of ["width", "height"]) {
                follow(gradioApp().querySelector(`#${tab}_${side} input[type=number]`), "value", loratorioPlaces.update);
            }
            for (const id of ["steps", "cfg_scale", "denoising_strength"]) {
                follow(gradioApp().querySelector(`#${tab}_${id} input[type=number]`), "value", () => refresh(tab));
            }
            tickAtStart(tab);
            partArrowAndBox(tab);
            refresh(tab);
            explainPresets(tab);
        }
        follow(textareaOf("hires_prompt"), "value", () => refresh("txt2img"));
    }

    onUiLoaded(update);
    onAfterUiUpdate(update);
    // The WebUI's button that lists the LoRAs again.
    document.addEventListener("click", event => event.target?.closest?.("[id$='_extra_refresh']") && found.forget(), true);
})();
