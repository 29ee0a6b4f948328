// Weight maps and the button of the WebUI's gallery that puts a picture through hires fix.
// The button puts the new picture, with its maps, in the place of the chosen one and leaves all else as it was: so the chosen one's own maps are
// taken out of what it sends. Python marks their infotexts (loratorio/webui/gallery.py).
"use strict";

const loratorioMaps = (function() {
    const MARK = ", LoRAtorio map: True";

    /** The infotext of the picture that a map belongs to; undefined if the text is not a map's. */
    function pictureOf(text) {
        return text?.endsWith(MARK) ? text.slice(0, -MARK.length) : undefined;
    }

    /** Number of the chosen picture, or of the one that a chosen map belongs to; -1 if unknown. */
    function pictureIndex(info, chosen) {
        const own = pictureOf(info.infotexts[chosen]);
        return own === undefined ? chosen : info.infotexts.indexOf(own, info.index_of_first_image ?? 0);
    }

    /**
     * The gallery, the chosen index and the pictures' infotexts that the button must send.
     *
     * A map that is chosen means its picture. Where the chosen picture stays in the gallery, its maps do.
     */
    function withoutItsMaps(gallery, chosen, info, stays) {
        const texts = info.infotexts;
        const index = pictureIndex(info, chosen);
        if (!(index >= (info.index_of_first_image ?? 0)) || !texts[index]) {
            return {gallery, index: chosen, info};
        }
        const kept = (_, place) => stays || pictureOf(texts[place]) !== texts[index];
        return {
            gallery: gallery.filter(kept),
            index: index - texts.slice(0, index).filter((text, place) => !kept(text, place)).length,
            info: {...info, infotexts: texts.filter(kept)},
        };
    }

    /** Change what the button's own function hands to the WebUI: the gallery, the chosen index, what is known of the pictures. */
    function wrap() {
        const submit = window.submit_txt2img_upscale;
        if (!submit || submit.loratorioWrapped) {
            return;
        }
        window.submit_txt2img_upscale = function(...given) {
            const sent = submit(...given);
            let info;
            try {
                info = JSON.parse(sent[3]);
            } catch {
                return sent;
            }
            if (Array.isArray(sent[1]) && Array.isArray(info?.infotexts)) {
                const stays = typeof opts !== "undefined" && opts.hires_button_gallery_insert === true;
                const changed = withoutItsMaps(sent[1], sent[2], info, stays);
                [sent[1], sent[2], sent[3]] = [changed.gallery, changed.index, JSON.stringify(changed.info)];
            }
            return sent;
        };
        window.submit_txt2img_upscale.loratorioWrapped = true;
    }

    onUiLoaded(wrap);

    return {pictureIndex};
})();
