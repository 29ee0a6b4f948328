// Places of the prompt's LoRAs: a small picture with a box for each, to drag, resize and draw. Drawn boxes are written into the tags, typed
// ones are shown. One per tab, made by JavaScript alone. Uses loratorioTags (loratorio_tags.js) and loratorioMaps (loratorio_maps.js).
"use strict";

const loratorioPlaces = (function() {
    let NAMED = {}, ALIASES = {}, COLOURS = []; // from loratorio/prompt/places.py and pictures/colours.py, by the panel's line
    const LEAST = 0.04; // a box's side, as a part of the picture's
    const SNAP = 0.025;
    const STEP = 0.05; // of the arrow keys
    const HELP = "Drag on the picture to draw a place for the marked LoRA. Drag a box to move it, or its edges to resize it. Double-click removes it. "
        + "Keys: arrows move, Shift+arrows resize, Delete removes, Ctrl+Z undoes.";
    const EVERYWHERE = "everywhere";
    const AUTO = "auto"; // the same word is in loratorio/prompt/places.py
    const FOUND = "found";
    const FOUND_HELP = "LoRAtorio finds the places in the first steps (at=auto), in each picture its own.";
    const DRAWN_HELP = "Places in the tags: those that were found last, or else side by side. Drag them to where you want them.";
    const KEEP_HELP = "Write the places of this picture into the tags";
    // The elements with img2img's input picture, one for each of its tabs.
    const INPUTS = ["img2img_image", "img2img_sketch", "img2maskimg", "inpaint_sketch", "img_inpaint_base"];

    /** An option `at=…` as boxes [x0, y0, x1, y1] and the text of its edge; null if it cannot be read. `auto`: they are found. */
    function parse(value) {
        const [places, ...edge] = value.trim().toLowerCase().split("~");
        if (places.trim() === AUTO && edge.length < 2) {
            return {auto: true, boxes: [], edge: edge.length ? "~" + edge[0] : ""};
        }
        const boxes = places.split("+").map(part => {
            const name = part.trim();
            const named = NAMED[ALIASES[name] ?? name];
            const box = named ?? name.split(",").map(Number);
            const fits = box.length === 4 && box.every(each => each >= 0 && each <= 1) && box[0] < box[2] && box[1] < box[3];
            return fits ? [...box] : null;
        });
        return boxes.includes(null) || edge.length > 1 ? null : {boxes, edge: edge.length ? "~" + edge[0] : ""};
    }

    const nameOf = box => Object.keys(NAMED).find(each => NAMED[each].every((side, i) => Math.abs(side - box[i]) < 0.005));

    /** Boxes as text, by name if there is one. */
    function written({boxes, edge}) {
        return boxes.map(box => nameOf(box) ?? box.map(side => String(Math.round(side * 100) / 100)).join(",")).join("+") + edge;
    }

    /** The places that were found for a picture, by LoRA name, as its infotext has them (loratorio/pictures/infotext.py). */
    function foundIn(infotext, names) {
        const last = infotext?.split("\n").pop() ?? "";
        const field = last.match(/(?:^|, )LoRAtorio places: ("(?:[^"\\]|\\.)*"|[^,]*)/)?.[1] ?? "";
        let text = "";
        try {
            text = ", " + (field.startsWith('"') ? JSON.parse(field) : field);
        } catch {
            // Not what LoRAtorio writes.
        }
        return Object.fromEntries(names.map(name => {
            const start = text.indexOf(`, ${name} at `);
            const value = start < 0 ? "" : text.slice(start + name.length + 6).match(/^[\d.,+~]*\d/)?.[0] ?? "";
            return [name, value && parse(value) ? value : undefined];
        }));
    }

    /** A LoRA's place in a word or two. */
    function described(lora) {
        if (lora.options.at === undefined) {
            return EVERYWHERE;
        }
        if (!lora.place) {
            return `at=${lora.options.at} cannot be read`;
        }
        const {auto, boxes, edge} = lora.place;
        return (auto ? FOUND : boxes.length > 1 ? `${boxes.length} places` : nameOf(boxes[0]) ?? "drawn") + (edge ? ", soft" : "");
    }

    function element(tag, className, text) {
        const made = document.createElement(tag);
        made.className = className;
        made.textContent = text ?? "";
        return made;
    }

    const snapped = side => [0, 0.25, 0.5, 0.75, 1].find(line => Math.abs(line - side) < SNAP) ?? side;
    const clamped = (value, least, most) => Math.min(Math.max(value, least), most);

    /** A box with some of its sides moved by dx and dy; without sides the whole box. */
    function moved(box, sides, dx, dy, snap) {
        const near = snap ? snapped : side => side;
        if (!sides) {
            const width = box[2] - box[0], height = box[3] - box[1];
            const x = clamped(near(box[0] + dx), 0, 1 - width), y = clamped(near(box[1] + dy), 0, 1 - height);
            return [x, y, x + width, y + height];
        }
        const result = [...box];
        if (sides.includes("w")) result[0] = clamped(near(box[0] + dx), 0, box[2] - LEAST);
        if (sides.includes("e")) result[2] = clamped(near(box[2] + dx), box[0] + LEAST, 1);
        if (sides.includes("n")) result[1] = clamped(near(box[1] + dy), 0, box[3] - LEAST);
        if (sides.includes("s")) result[3] = clamped(near(box[3] + dy), box[1] + LEAST, 1);
        return result;
    }

    /** One tab's canvas. */
    class Canvas {
        constructor(tab, root) {
            this.tab = tab;
            this.root = root;
            this.loras = [];
            this.picked = null; // the LoRA whose name was clicked last, until its place is drawn
            this.last = 0; // the LoRA whose place was drawn or taken hold of last
            this.fold = element("details", "loratorio-places-fold");
            this.summary = element("summary", "", "");
            this.names = element("div", "loratorio-places-names");
            this.canvas = element("div", "loratorio-places-canvas");
            // The names beside or below the picture: it stays where it is when they change.
            const side = element("div", "loratorio-places-side");
            this.choice = element("div", "loratorio-places-choice", "Give each its own place: ");
            this.choose = {
                [FOUND]: this.button(FOUND, FOUND_HELP, () => this.findAll()),
                drawn: this.button("drawn", DRAWN_HELP, () => this.keep(true)),
            };
            this.keeper = this.button("Keep", KEEP_HELP, () => this.keep(false));
            this.choice.setAttribute("role", "radiogroup");
            Object.values(this.choose).forEach(each => each.setAttribute("role", "radio"));
            this.choice.append(...Object.values(this.choose), this.keeper);
            side.append(this.choice, this.names, element("p", "loratorio-places-help", HELP));
            const body = element("div", "loratorio-places-body");
            body.append(this.canvas, side);
            this.fold.append(this.summary, body);
            root.replaceChildren(this.fold);
            this.canvas.addEventListener("pointerdown", event => this.draw(event));
            this.fold.addEventListener("toggle", () => this.underlay());
            this.fold.addEventListener("pointerenter", () => this.underlay());
            this.fold.addEventListener("keydown", event => loratorioTags.undoKey(event, this.textarea));
        }

        button(text, title, action) {
            const made = element("button", "loratorio-places-name", text);
            made.type = "button";
            made.title = title;
            made.id = `loratorio_${this.tab}_places_${text.toLowerCase()}`;
            made.addEventListener("click", action);
            return made;
        }

        /** The characters: the content LoRAs that have places, or where none has one, all of them. */
        get characters() {
            const content = this.loras.filter(lora => lora.role === "content" && !lora.pool);
            const placed = content.filter(lora => lora.options.at !== undefined);
            return placed.length ? placed : content;
        }

        /** Every character's place is found from now on. */
        findAll() {
            this.characters.forEach(lora => this.writeText(lora, AUTO + (lora.place?.edge ?? "")));
        }

        /** Write the places that were found into the tags; `all`: where none is known, side by side. */
        keep(all) {
            const auto = this.characters.filter(lora => lora.place?.auto || all && !lora.place);
            auto.forEach((lora, i) => {
                const column = [i / auto.length, 0, (i + 1) / auto.length, 1];
                const place = this.found?.[lora.name] ?? (all ? written({boxes: [column], edge: lora.place?.edge ?? ""}) : undefined);
                if (place) {
                    this.writeText(lora, place);
                }
            });
        }

        /** Bring the canvas up to date with the prompt's LoRAs; only those that can have a place. */
        show(textarea, loras) {
            this.textarea = textarea;
            this.all = loras;
            this.loras = loras.filter(lora => lora.role !== "always" || lora.options.at).map(lora => ({...lora}));
            this.root.hidden = !this.loras.length;
            this.loras.forEach((lora, i) => {
                lora.colour = `rgb(${COLOURS[i % COLOURS.length].join(",")})`;
                lora.place = lora.options.at === undefined ? null : parse(lora.options.at);
            });
            const placed = this.loras.filter(lora => lora.options.at !== undefined);
            this.summary.textContent = "Places: " + (placed.length
                ? placed.map(lora => `${lora.name} ${described(lora)}`).join(" · ")
                : "every LoRA everywhere");
            if (placed.length && !this.opened) {
                this.opened = this.fold.open = true; // only once, so that it stays folded if the user folds it
            }
            this.aspect();
            if (!this.dragging) {
                this.underlay();
                this.render();
            }
        }

        /** Redraw the LoRAs only if they have changed: during a double click or a drag, a box must stay the same element. */
        render() {
            const state = JSON.stringify([this.loras, this.found]);
            if (this.drawn === state) {
                return;
            }
            this.drawn = state;
            loratorioTags.keepingFocus(() => {
                this.names.replaceChildren(...this.loras.map((lora, i) => this.name(lora, i)));
                this.canvas.replaceChildren(...this.loras.flatMap((lora, i) => [
                    ...(lora.place?.boxes ?? []).map((box, number) => this.box(lora, i, box, number)),
                    ...this.foundBoxes(lora).map(box => this.foundBox(lora, box)),
                ]));
            });
            const {characters} = this;
            this.choice.hidden = characters.length < 2;
            const are = auto => characters.length > 1 && characters.every(lora => lora.place && !!lora.place.auto === auto);
            this.choose[FOUND].setAttribute("aria-checked", String(are(true)));
            this.choose.drawn.setAttribute("aria-checked", String(are(false)));
            this.keeper.hidden = !this.loras.some(lora => this.foundBoxes(lora).length);
            this.mark();
        }

        /** The boxes that were found for a LoRA in the picture that is shown. */
        foundBoxes(lora) {
            return lora.place?.auto && this.found?.[lora.name] ? parse(this.found[lora.name]).boxes : [];
        }

        foundBox(lora, box) {
            const made = element("div", "loratorio-places-box found");
            made.style.setProperty("--colour", lora.colour);
            made.append(element("span", "loratorio-places-label", lora.name));
            this.put(made, lora, box);
            made.setAttribute("role", "img");
            made.setAttribute("aria-label", `Found: ${made.getAttribute("aria-label").split(". ")[0]}`);
            return made;
        }

        /** The picture's own aspect. */
        aspect() {
            const side = name => Number(gradioApp().querySelector(`#${this.tab}_${name} input[type=number]`)?.value) || 512;
            const ratio = side("width") / side("height");
            this.canvas.style.aspectRatio = String(ratio);
            this.canvas.style.width = `min(100%, ${Math.round(ratio >= 1 ? 320 : Math.max(140, 320 * ratio))}px)`;
        }

        /** Show img2img's input picture, or else the gallery's, under the boxes. */
        underlay() {
            const inputs = this.tab === "img2img" ? INPUTS.map(id => gradioApp().querySelector(`#${id}`)) : [];
            const input = inputs.find(each => each?.offsetParent)?.querySelector("img");
            const shown = input?.naturalWidth ? {picture: input} : this.ofGallery();
            const {picture} = shown;
            const found = shown.infotext ? foundIn(shown.infotext, this.loras.map(lora => lora.name)) : undefined;
            if (JSON.stringify(found) !== JSON.stringify(this.found)) {
                this.found = found;
                this.render();
            }
            const source = picture?.src ?? "";
            if (this.source !== source) {
                this.source = source;
                this.canvas.style.backgroundImage = source ? `url("${source.replace(/["\\]/g, "\\$&")}")` : "";
            }
        }

        /** The gallery's picture, with its infotext: the chosen one, that of a chosen map, or the first, not the grid. */
        ofGallery() {
            const gallery = gradioApp().querySelector(`#${this.tab}_gallery`);
            const listed = gallery?.querySelectorAll(".thumbnails > .thumbnail-item") ?? [];
            const items = [...listed.length ? listed : gallery?.querySelectorAll(".thumbnail-item") ?? []];
            let index = Math.max(0, items.findIndex(each => each.classList.contains("selected")));
            let infotext;
            try {
                const info = JSON.parse(gradioApp().querySelector(`#generation_info_${this.tab} textarea`).value);
                index = Math.max(loratorioMaps.pictureIndex(info, index), info.index_of_first_image ?? 0);
                infotext = info.infotexts[index];
            } catch {
                // Nothing is known about the pictures.
            }
            return {picture: items[index]?.querySelector("img") ?? gallery?.querySelector("img"), infotext};
        }

        /** A LoRA's row: its name, which a click marks for drawing, and its place to choose. */
        name(lora, i) {
            const made = element("div", "loratorio-places-row");
            const button = element("button", "loratorio-places-name", "");
            button.type = "button";
            button.id = `loratorio_${this.tab}_place_name_${i}`;
            button.title = "Draw the next place for this LoRA";
            const swatch = element("span", "loratorio-places-swatch");
            swatch.style.background = lora.colour;
            button.append(swatch, (lora.pool ? "pool " : "") + lora.name);
            button.addEventListener("click", () => {
                this.picked = i;
                this.mark();
            });
            made.append(button, this.placeMenu(lora, i));
            return made;
        }

        placeMenu(lora, i) {
            const menu = element("select", "loratorio-places-where");
            menu.id = `loratorio_${this.tab}_place_menu_${i}`;
            menu.setAttribute("aria-label", "Place of " + lora.name);
            menu.classList.toggle("loratorio-wrong", lora.options.at !== undefined && !lora.place);
            const now = described(lora);
            menu.title = now;
            for (const each of new Set([EVERYWHERE, FOUND, ...Object.keys(NAMED), now])) {
                menu.append(new Option(each, each, false, each === now));
            }
            const edge = lora.place?.edge ?? "";
            menu.addEventListener("change", () => (menu.value === FOUND ? this.writeText(lora, AUTO + edge) : this.write(
                lora, NAMED[menu.value] ? {boxes: [NAMED[menu.value]], edge} : null,
            )));
            return menu;
        }

        /** The LoRA that the next place is drawn for: the picked one, else the next content LoRA without a place. */
        get target() {
            const waiting = this.loras.findIndex(lora => lora.options.at === undefined && lora.role === "content");
            const chosen = this.picked ?? (waiting < 0 ? this.last : waiting);
            return clamped(chosen, 0, this.loras.length - 1);
        }

        /** Show for which LoRA the next place is drawn. */
        mark() {
            const target = this.target;
            this.names.querySelectorAll("button").forEach((each, i) => each.setAttribute("aria-pressed", String(i === target)));
        }

        box(lora, i, box, number) {
            const made = element("div", "loratorio-places-box");
            made.id = `loratorio_${this.tab}_box_${i}_${number}`;
            made.tabIndex = 0;
            made.setAttribute("role", "group");
            made.style.setProperty("--colour", lora.colour);
            made.append(element("span", "loratorio-places-label", lora.name));
            for (const sides of ["n", "e", "s", "w", "ne", "se", "sw", "nw"]) {
                const handle = element("span", `loratorio-places-handle ${sides}`);
                handle.dataset.sides = sides;
                made.append(handle);
            }
            this.put(made, lora, box);
            made.addEventListener("pointerdown", event => this.drag(event, made, lora, i, number));
            made.addEventListener("dblclick", () => this.remove(lora, number));
            made.addEventListener("keydown", event => this.key(event, lora, number));
            return made;
        }

        put(made, lora, box) {
            const percent = side => `${side * 100}%`;
            Object.assign(made.style, {
                left: percent(box[0]), top: percent(box[1]), width: percent(box[2] - box[0]), height: percent(box[3] - box[1]),
            });
            const [x0, y0, x1, y1] = box.map(side => Math.round(side * 100));
            made.setAttribute("aria-label", `Place of ${lora.name}: from ${x0} to ${x1} % across, ${y0} to ${y1} % down. `
                + "Arrow keys move it, with Shift they resize it, Delete: everywhere.");
        }

        /** Follow the pointer until it is let go: `change` gets how far it is from where it began, in parts of the picture. */
        follow(event, change, done) {
            const area = this.canvas.getBoundingClientRect();
            const at = each => [(each.clientX - area.left) / area.width, (each.clientY - area.top) / area.height];
            const start = at(event);
            let far = false;
            event.preventDefault();
            this.dragging = true;
            const move = each => {
                const now = at(each);
                far ||= Math.hypot(now[0] - start[0], now[1] - start[1]) > 0.01;
                if (far) {
                    change(now[0] - start[0], now[1] - start[1], start, now);
                }
            };
            const end = each => {
                window.removeEventListener("pointermove", move);
                window.removeEventListener("pointerup", end);
                window.removeEventListener("pointercancel", end);
                this.dragging = false;
                // A click keeps the box elements: the next one may make it a double click.
                if (far) {
                    this.drawn = null;
                }
                if (far && each.type === "pointerup") {
                    done();
                }
                this.render();
            };
            window.addEventListener("pointermove", move);
            window.addEventListener("pointerup", end);
            window.addEventListener("pointercancel", end);
        }

        drag(event, made, lora, i, number) {
            if (event.button) {
                return;
            }
            event.stopPropagation();
            made.focus({preventScroll: true});
            this.last = i;
            const sides = event.target.dataset?.sides;
            const before = lora.place.boxes[number];
            let now = before;
            this.follow(event, (dx, dy) => {
                now = moved(before, sides, dx, dy, true);
                this.put(made, lora, now);
            }, () => this.change(lora, number, now));
        }

        /** A new box on the free picture, for the marked LoRA. */
        draw(event) {
            const {target} = this;
            const lora = this.loras[target];
            if (event.button || event.target !== this.canvas || !lora) {
                return;
            }
            const made = element("div", "loratorio-places-box drawn");
            made.style.setProperty("--colour", lora.colour);
            let box = null;
            this.follow(event, (dx, dy, start, now) => {
                const [xs, ys] = [0, 1].map(axis => [start[axis], now[axis]].map(side => snapped(clamped(side, 0, 1))).sort((a, b) => a - b));
                box = [xs[0], ys[0], xs[1], ys[1]];
                this.put(made, lora, box);
                this.canvas.append(made);
            }, () => {
                if (box && box[2] - box[0] >= LEAST && box[3] - box[1] >= LEAST) {
                    const place = lora.place ?? {boxes: [], edge: ""};
                    this.last = target;
                    this.picked = null;
                    this.write(lora, {...place, boxes: [...place.boxes, box]});
                }
            });
        }

        key(event, lora, number) {
            const directions = {ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP]};
            const box = lora.place.boxes[number];
            if (directions[event.key]) {
                const sides = event.shiftKey ? (directions[event.key][0] ? "e" : "s") : undefined;
                this.change(lora, number, moved(box, sides, ...directions[event.key], false));
            } else if (event.key === "Delete" || event.key === "Backspace") {
                this.remove(lora, number);
            } else {
                return;
            }
            event.preventDefault();
            event.stopPropagation();
        }

        change(lora, number, box) {
            this.write(lora, {...lora.place, boxes: lora.place.boxes.map((each, i) => i === number ? box : each)});
        }

        remove(lora, number) {
            const boxes = lora.place.boxes.filter((_, i) => i !== number);
            this.write(lora, boxes.length ? {...lora.place, boxes} : null);
        }

        /** Into the tag; the prompt's change brings the canvas up to date. */
        write(lora, place) {
            this.writeText(lora, place ? written(place) : undefined);
        }

        writeText(lora, value) {
            loratorioTags.write(this.textarea, lora.numbers, "at", value, this.canvas);
        }
    }

    const canvases = {};

    /** Called by the panel's line whenever the prompt's LoRAs or their roles have changed. */
    function show(tab, textarea, loras, names) {
        ({places: NAMED, aliases: ALIASES, colours: COLOURS} = names);
        const root = gradioApp().querySelector(`#loratorio_${tab}_places`);
        if (!root) {
            return;
        }
        if (canvases[tab]?.root !== root) {
            canvases[tab] = new Canvas(tab, root);
        }
        canvases[tab].show(textarea, loras);
    }

    /** The picture's size, or the picture below the boxes, may have changed. */
    function update() {
        for (const canvas of Object.values(canvases)) {
            if (!canvas.dragging) {
                canvas.aspect();
                canvas.underlay();
            }
        }
    }

    onAfterUiUpdate(update);
    // A picture is loaded after it is put into the page.
    document.addEventListener("load", event => INPUTS.some(id => event.target.closest?.(`#${id}`)) && update(), true);

    return {show, update};
})();
