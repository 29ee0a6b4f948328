// LoRA tags of a prompt, read and written; and the WebUI's own ways to edit them, for tags that have options.
"use strict";

const loratorioTags = (function() {
    /** The prompt as the WebUI reads it: with spaces for comments after a #, if its option for comments is on. */
    function withoutComments(prompt) {
        const on = typeof opts !== "undefined" && opts.enable_prompt_comments;
        return on ? prompt.replace(/#[^\n]*/g, comment => " ".repeat(comment.length)) : prompt;
    }

    /** A tag's content split at its colons, except those inside brackets of own words. The same rule is in loratorio/prompt/tags.py. */
    function split(content) {
        const parts = [];
        for (const part of content.split(":")) {
            const last = parts[parts.length - 1] ?? "";
            const count = signs => [...last.replace(/\\./g, "")].filter(sign => signs.includes(sign)).length;
            if (last.startsWith("words=") && count("([") > count(")]")) {
                parts[parts.length - 1] += ":" + part;
            } else {
                parts.push(part);
            }
        }
        return parts;
    }

    /** Whether a part of a tag has a name. The WebUI's own rule: exactly one = makes it so; own words may have more. */
    const isOption = part => part.split("=").length === 2 || part.startsWith("words=");

    /** The parts of a tag behind its kind and name: numbers by position, options by name. */
    function partsOf(parts) {
        const positional = [];
        const options = Object.create(null);
        for (const part of parts) {
            if (isOption(part)) {
                const [key, ...value] = part.split("=");
                options[key] = value.join("=");
            } else {
                positional.push(part);
            }
        }
        return {positional, options};
    }

    /**
     * The LoRAs and pools of a prompt, in its order: name, strengths in the UNet and in the text encoder as text, options as written,
     * the tag itself, and its start and end.
     */
    function read(prompt) {
        const found = [];
        for (const match of withoutComments(prompt).matchAll(/<(lora|lyco|[Pp][Oo][Oo][Ll]):([^>]+)>/g)) {
            const [name, ...rest] = split(match[2]);
            const {positional, options} = partsOf(rest);
            const text = options.te ?? positional[0] ?? "1";
            const unet = options.unet ?? positional[1] ?? text;
            found.push({
                pool: match[1].toLowerCase() === "pool",
                name,
                unet: plain(unet),
                text: plain(text),
                options,
                tag: match[0],
                start: match.index,
                end: match.index + match[0].length,
            });
        }
        return found;
    }

    /** "0.80" as "0.8"; text that is not a number is unchanged. */
    function plain(number) {
        const value = Number(number);
        return number.trim() !== "" && Number.isFinite(value) ? String(value) : number;
    }

    /**
     * Write an option of the LoRA whose tags in the textarea have these numbers; undefined removes it.
     *
     * Options come before the strength, because the WebUI's Ctrl+Up and Ctrl+Down change the number at a tag's end. `anchor` is the
     * element that the user is looking at.
     */
    function write(textarea, numbers, option, value, anchor) {
        const written = read(textarea.value);
        // From the last to the first, each of which stays where it is meanwhile.
        const tags = numbers.map(number => written[number]).filter(Boolean).sort((a, b) => b.start - a.start);
        const prompt = tags.reduce((text, lora) => text.slice(0, lora.start) + changed(lora.tag, option, value) + text.slice(lora.end),
            textarea.value);
        if (prompt !== textarea.value) {
            replace(textarea, 0, textarea.value.length, prompt, anchor);
        }
    }

    /** A tag with another value of an option. */
    function changed(tag, option, value) {
        const [kind, name, ...rest] = split(tag.slice(1, -1));
        const options = rest.filter(part => isOption(part) && part.split("=")[0] !== option);
        const numbers = rest.filter(part => !isOption(part));
        if (value !== undefined) {
            options.push(`${option}=${value}`);
        }
        if (!numbers.length && options.length && !options.some(part => /^(te|unet)=/.test(part))) {
            numbers.push("1");
        }
        return `<${[kind, name, ...options, ...numbers].join(":")}>`;
    }

    /** Replace a part of the textarea's text as if it were typed, so that the browser can undo it. */
    function replace(textarea, start, end, text, anchor = textarea) {
        const done = edited(textarea, anchor, () => {
            textarea.setSelectionRange(start, end);
            return document.execCommand(text ? "insertText" : "delete", false, text);
        });
        if (!done) { // a textarea that is hidden
            textarea.value = textarea.value.slice(0, start) + text + textarea.value.slice(end);
            textarea.dispatchEvent(new Event("input", {bubbles: true}));
        }
    }

    /**
     * Edit the textarea while it has the focus. Returns the result of `edit`, or false if it cannot have the focus.
     *
     * The browser scrolls to the textarea, and Gradio makes it as high as its text. The anchor keeps its position all the same.
     */
    function edited(textarea, anchor, edit) {
        const before = anchor.getBoundingClientRect();
        const stay = () => {
            const now = anchor.getBoundingClientRect();
            window.scrollBy(now.left - before.left, now.top - before.top);
        };
        const done = keepingFocus(() => {
            textarea.focus({preventScroll: true});
            return document.activeElement === textarea && edit();
        });
        stay();
        requestAnimationFrame(stay);
        return done;
    }

    /** Run `action`, which may take the focus or replace the focused element by one with the same id. Returns its result. */
    function keepingFocus(action) {
        const before = document.activeElement;
        const result = action();
        const after = before?.isConnected ? before : document.getElementById(before?.id);
        if (after === document.body) {
            document.activeElement?.blur();
        } else if (after !== document.activeElement) {
            after?.focus({preventScroll: true});
        }
        return result;
    }

    /** Ctrl+Z and the like outside of the textarea: undo or redo what was written into it. */
    function undoKey(event, textarea) {
        const key = (event.ctrlKey || event.metaKey) && !event.altKey ? event.key.toLowerCase() : "";
        if (key === "z" || key === "y") {
            event.preventDefault();
            edited(textarea, event.currentTarget, () => document.execCommand(key === "z" && !event.shiftKey ? "undo" : "redo"));
        }
    }

    // -- the WebUI's own editing --------------------------------------------------------------------------------------

    /** A click on a LoRA's card removes its tag again; the WebUI itself finds only tags without options. */
    function removeOnCardClick() {
        const original = window.tryToRemoveExtraNetworkFromPrompt;
        if (typeof original !== "function" || original.knowsOptions) {
            return;
        }
        const extended = function(textarea, text, isNegative) {
            if (original.call(this, textarea, text, isNegative)) {
                return true;
            }
            const clicked = read(text)[0];
            const found = clicked && read(textarea.value).find(
                lora => lora.name === clicked.name && lora.pool === clicked.pool && Object.keys(lora.options).length,
            );
            if (!found) {
                return false;
            }
            const separator = (typeof opts !== "undefined" && opts.extra_networks_add_text_separator) || " ";
            const before = textarea.value.slice(0, found.start);
            const start = before.endsWith(separator) ? found.start - separator.length : found.start;
            // What the WebUI added with the tag, its activation text, goes with it.
            const added = text.slice(text.indexOf(">") + 1);
            const after = textarea.value.slice(found.end);
            const end = added && after.startsWith(added) ? found.end + added.length : found.end;
            replace(textarea, start, end, "");
            return true;
        };
        extended.knowsOptions = true;
        window.tryToRemoveExtraNetworkFromPrompt = extended;
    }

    /** Ctrl+Up and Ctrl+Down in a tag whose options come after its strength, which the WebUI would not find. */
    function changeStrength(event) {
        const isUp = event.key === "ArrowUp";
        const area = event.composedPath()[0];
        if (!(event.ctrlKey || event.metaKey) || !(isUp || event.key === "ArrowDown") || !area.matches?.("[id*='prompt'] textarea")) {
            return;
        }
        const at = area.selectionStart;
        const lora = read(area.value).find(each => each.start < at && at < each.end);
        const parts = lora ? split(lora.tag.slice(1, -1)) : [];
        const last = parts.findLastIndex?.(part => /^\s*-?[\d.]+\s*$/.test(part)) ?? -1;
        if (last < 2 || last === parts.length - 1) {
            return;
        }
        event.preventDefault();
        event.stopImmediatePropagation();
        const step = (typeof opts !== "undefined" && Number(opts.keyedit_precision_extra)) || 0.05;
        parts[last] = String(parseFloat((Number(parts[last]) + (isUp ? step : -step)).toPrecision(12)));
        replace(area, lora.start, lora.end, `<${parts.join(":")}>`);
        area.setSelectionRange(at, at);
    }

    window.addEventListener("keydown", changeStrength, true);
    onUiLoaded(removeOnCardClick);

    return {read, write, keepingFocus, undoKey, withoutComments};
})();
