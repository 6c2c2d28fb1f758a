"use strict";
// The page of `hexa explore`. N images are numbers 0 ... N - 1 everywhere; a map gives each a point
// in the unit square ("world"), and the view turns world into CSS pixels of the canvas.
(() => {
  const $ = (id) => document.getElementById(id);
  const data = JSON.parse($("data").textContent);
  const N = data.names.length;
  const ALL = Array.from({ length: N }, (_, i) => i);
  // Which images stand for the others on a crowded map: any, not those of the first folder.
  const priority = new Uint32Array(N);
  for (let i = 0; i < N; i++) priority[i] = Math.imul(i + 1, 2654435761);
  const SHUFFLED = ALL.slice().sort((a, b) => priority[a] - priority[b]);
  const canvas = $("canvas");
  const context = canvas.getContext("2d");
  const share = (whole) => whole / data.precision;
  const percent = (whole) => (100 * share(whole)).toFixed(1) + " %";
  const counted = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

  // ---- Thumbnails -------------------------------------------------------------------------------

  const sheets = [];

  async function decodeSheets() {
    await Promise.all(data.atlases.map(async (uri, number) => {
      const image = new Image();
      image.src = uri;
      await image.decode();
      // A bitmap is decoded once; an <img> may be decoded again in the middle of a pan.
      sheets[number] = await createImageBitmap(image);
    }));
    data.atlases = null;
  }

  function drawThumbnail(target, i, x, y, size) {
    const perSheet = data.columns * data.columns;
    const sheet = sheets[Math.floor(i / perSheet)];
    if (!sheet) return;
    const cell = i % perSheet;
    const left = (cell % data.columns) * data.side;
    const top = Math.floor(cell / data.columns) * data.side;
    target.drawImage(sheet, left, top, data.side, data.side, x, y, size, size);
  }

  function element(tag, properties = {}, ...children) {
    const { dataset, aria, ...rest } = properties;
    const node = Object.assign(document.createElement(tag), rest);
    for (const [name, value] of Object.entries(aria ?? {})) node.setAttribute(`aria-${name}`, value);
    Object.assign(node.dataset, dataset);
    node.append(...children);
    return node;
  }

  function picture(images, pixels) {
    const node = element("canvas", { width: pixels * images.length, height: pixels });
    const target = node.getContext("2d");
    images.forEach((i, place) => drawThumbnail(target, i, place * pixels, 0, pixels));
    return node;
  }

  function thumbnail(i, caption) {
    const name = data.names[i];
    const node = element("button", { type: "button", className: "thumb", title: name, dataset: { image: i } });
    node.setAttribute("aria-label", caption ? `${name}, ${caption}` : name);
    const stem = name.slice(name.lastIndexOf("/") + 1).replace(/\.\w+$/, "");
    // The ends of names tell them apart.
    const short = stem.length > 11 ? `\u2026${stem.slice(-9)}` : stem;
    node.append(picture([i], Math.min(data.side, 128)), element("span", { textContent: caption ?? short }));
    node.classList.toggle("current", i === selected);
    node.addEventListener("click", () => select(i));
    return node;
  }

  /** A grid of thumbnails that grows by `step` on request: thousands at once would freeze the page. */
  function gridOf(images, caption = () => undefined, step = 60) {
    const grid = element("div", { className: "grid" });
    const box = element("div", {}, grid);
    const more = element("button", { type: "button" });
    let shown = 0;
    const grow = () => {
      for (const i of images.slice(shown, shown + step)) grid.append(thumbnail(i, caption(i)));
      shown = Math.min(shown + step, images.length);
      more.textContent = `Show more of ${images.length.toLocaleString("en")}`;
      more.hidden = shown >= images.length;
    };
    more.addEventListener("click", grow);
    grow();
    box.append(more);
    return box;
  }

  // ---- Colors -----------------------------------------------------------------------------------

  const style = {};
  const ranks = new Float32Array(N);  // share of the images that are less of an outlier
  ALL.slice().sort((a, b) => data.outlier[a] - data.outlier[b]).forEach((i, rank) => { ranks[i] = N > 1 ? rank / (N - 1) : 0; });
  const byOutlier = ALL.slice().sort((a, b) => data.outlier[b] - data.outlier[a]);
  const OUTLIER_STEPS = 24;
  const colorings = { cluster: { title: "cluster", of: data.clusters } };
  if (data.labels) colorings.label = { title: "label", of: data.labels.of, names: data.labels.names };
  if (data.folders) colorings.folder = { title: "folder", of: data.folders.of, names: data.folders.names };
  colorings.outlier = {
    title: "outlier score",
    of: Array.from(ranks, (rank) => Math.min(OUTLIER_STEPS - 1, Math.floor(rank * OUTLIER_STEPS))),
  };
  let coloring = "cluster";
  let palette = new Uint32Array(0);  // pixel of each value of the coloring
  let faded = new Uint32Array(0);  // the same, almost hidden
  let rings = [];  // the color of the frame of a thumbnail
  let background = 0;
  let markColor = 0;

  function colorOf(kind, value) {
    if (kind === "outlier") return `hsl(${220 - 205 * value / OUTLIER_STEPS} 75% ${style.lightness})`;
    // Multiples of the golden angle: neighbors in number are far apart in hue.
    return `hsl(${(value * 137.508 + 210) % 360} ${70 - 18 * (value % 3)}% ${style.lightness})`;
  }

  function readStyle() {
    const computed = getComputedStyle(document.documentElement);
    for (const name of ["back", "text", "faint", "mark", "accent"]) style[name] = computed.getPropertyValue(`--${name}`).trim();
    style.lightness = computed.getPropertyValue("--dot-lightness").trim();
  }

  const probe = element("canvas", { width: 1, height: 1 }).getContext("2d", { willReadFrequently: true });

  /** A CSS color over the background, as the bytes of a pixel in the order of this machine. */
  function pixel(color, alpha = 1) {
    probe.globalAlpha = 1;
    probe.fillStyle = style.back;
    probe.fillRect(0, 0, 1, 1);
    probe.globalAlpha = alpha;
    probe.fillStyle = color;
    probe.fillRect(0, 0, 1, 1);
    return new Uint32Array(probe.getImageData(0, 0, 1, 1).data.buffer)[0];
  }

  function recolor() {
    readStyle();
    const values = Math.max(...colorings[coloring].of) + 1;
    palette = Uint32Array.from({ length: values }, (_, value) => pixel(colorOf(coloring, value)));
    faded = Uint32Array.from({ length: values }, (_, value) => pixel(colorOf(coloring, value), 0.22));
    rings = Array.from({ length: values }, (_, value) => colorOf(coloring, value));
    background = pixel(style.back);
    markColor = pixel(style.mark);
    redraw();
  }

  // ---- Points and levels of detail --------------------------------------------------------------

  let xs = [];
  let ys = [];
  let bounds = { left: 0, right: 1, top: 0, bottom: 1 };
  let spaced = new Map();  // of all images, by level
  let spacedMarked = new Map();  // of the marked ones
  let marked = null;  // a Set of images that stand out, or null
  let grid = new Map();  // for finding the image under the pointer
  const GRID = 128;

  function setMap(number) {
    const { x, y } = data.maps[number];
    xs = Float64Array.from(x, share);
    ys = Float64Array.from(y, share);
    spaced = new Map();
    spacedMarked = new Map();
    grid = new Map();
    for (let i = 0; i < N; i++) {
      const key = cellKey(xs[i], ys[i], GRID);
      if (!grid.has(key)) grid.set(key, []);
      grid.get(key).push(i);
    }
    bounds = { left: Math.min(...xs), right: Math.max(...xs), top: Math.min(...ys), bottom: Math.max(...ys) };
    showAll();
  }

  const cellKey = (x, y, cells) => Math.floor(x * cells) * 1048583 + Math.floor(y * cells);

  /**
   * Images that stay at least 2 ** -level apart, chosen once per level, the same for any pan. Those of
   * the coarser levels come first, so that zooming in adds thumbnails and removes none.
   */
  function atLevel(level, members, cache) {
    if (cache.has(level)) return cache.get(level);
    const coarser = level > -2 ? atLevel(level - 1, members, cache) : [];
    const gap = 2 ** -level;
    const cells = 1 / gap;
    const taken = new Map();
    const chosen = [];
    const seen = new Set(coarser);
    const consider = (i) => {
      const column = Math.floor(xs[i] * cells);
      const row = Math.floor(ys[i] * cells);
      for (let dx = -1; dx <= 1; dx++) {
        for (let dy = -1; dy <= 1; dy++) {
          const other = taken.get((column + dx) * 1048583 + row + dy);
          if (other !== undefined && Math.max(Math.abs(xs[other] - xs[i]), Math.abs(ys[other] - ys[i])) < gap) return;
        }
      }
      taken.set(column * 1048583 + row, i);
      chosen.push(i);
    };
    for (const i of coarser) consider(i);
    for (const i of members) if (!seen.has(i)) consider(i);
    cache.set(level, chosen);
    return chosen;
  }

  // ---- View -------------------------------------------------------------------------------------

  const view = { x: 0.5, y: 0.5, scale: 500 };
  const MAX_LEVEL = 14;
  const MARGIN = 80;  // CSS pixels around the whole map, for the thumbnails at its edge
  let width = 1;
  let height = 1;
  let pixelRatio = 1;
  let layer = new ImageData(1, 1);
  let dots = new Uint32Array(layer.data.buffer);
  let scheduled = false;
  let selected = null;
  const frames = [];  // milliseconds of script per drawn frame, the newest last

  const screenX = (i) => (xs[i] - view.x) * view.scale + width / 2;
  const screenY = (i) => (ys[i] - view.y) * view.scale + height / 2;
  const fitScale = () => Math.max(50, Math.min(
    (width - MARGIN) / Math.max(bounds.right - bounds.left, 0.05),
    (height - MARGIN) / Math.max(bounds.bottom - bounds.top, 0.05),
  ));
  const smallest = () => (width < 600 ? 30 : 38);  // side of a thumbnail on the map, in CSS pixels

  function resize() {
    const box = canvas.getBoundingClientRect();
    const fitted = Math.abs(view.scale - fitScale()) < 1;
    width = Math.max(1, box.width);
    height = Math.max(1, box.height);
    pixelRatio = Math.min(window.devicePixelRatio || 1, 2);
    canvas.width = Math.round(width * pixelRatio);
    canvas.height = Math.round(height * pixelRatio);
    layer = new ImageData(canvas.width, canvas.height);
    dots = new Uint32Array(layer.data.buffer);
    if (fitted) showAll(); else redraw();
  }

  function redraw() {
    if (scheduled) return;
    scheduled = true;
    requestAnimationFrame(() => {
      scheduled = false;
      const begin = performance.now();
      draw();
      frames.push(performance.now() - begin);
      if (frames.length > 600) frames.shift();
    });
  }

  function draw() {
    context.setTransform(pixelRatio, 0, 0, pixelRatio, 0, 0);
    drawDots();
    const level = Math.max(-2, Math.min(MAX_LEVEL, Math.floor(Math.log2(view.scale / smallest()))));
    const size = Math.min(0.94 * view.scale * 2 ** -level, 1.88 * smallest());
    const members = marked ? atLevel(level, marked, spacedMarked) : atLevel(level, SHUFFLED, spaced);
    for (const i of members) drawOne(i, size);
    if (selected !== null && (!marked || marked.has(selected))) drawSelected(size);
  }

  /** Fill the canvas with a dot per image. Writing pixels is several times faster than 10,000 fillRect. */
  function drawDots() {
    const { of } = colorings[coloring];
    const zoomed = Math.sqrt(view.scale / fitScale());
    const side = Math.round(pixelRatio * Math.max(2, Math.min(6, 225 / Math.sqrt(N) * zoomed)));
    dots.fill(background);
    const colors = marked ? faded : palette;
    for (let i = 0; i < N; i++) dot(i, side, colors[of[i]]);
    if (marked) for (const i of marked) dot(i, side, markColor);
    context.putImageData(layer, 0, 0);
  }

  function dot(i, side, color) {
    const columns = layer.width;
    const rows = layer.height;
    const left = Math.round(screenX(i) * pixelRatio - side / 2);
    const top = Math.round(screenY(i) * pixelRatio - side / 2);
    if (left < 0 || top < 0 || left + side > columns || top + side > rows) return;
    for (let row = 0; row < side; row++) {
      // Without its corners, a square looks round.
      const inset = side > 3 && (row === 0 || row === side - 1) ? 1 : 0;
      const start = (top + row) * columns + left;
      dots.fill(color, start + inset, start + side - inset);
    }
  }

  function drawOne(i, size, ring) {
    const x = screenX(i) - size / 2;
    const y = screenY(i) - size / 2;
    if (x > width || y > height || x + size < 0 || y + size < 0) return;
    const edge = ring ? 3 : 2;
    context.fillStyle = ring ?? rings[colorings[coloring].of[i]];
    context.fillRect(x - edge, y - edge, size + 2 * edge, size + 2 * edge);
    drawThumbnail(context, i, x, y, size);
  }

  function drawSelected(size) {
    const near = data.neighbors[selected];
    context.strokeStyle = style.accent;
    context.lineWidth = 1.5;
    context.beginPath();
    for (const i of near) {
      context.moveTo(screenX(selected), screenY(selected));
      context.lineTo(screenX(i), screenY(i));
    }
    context.stroke();
    for (const i of near) drawOne(i, 0.75 * size, style.accent);
    drawOne(selected, Math.max(size, 48), style.mark);
  }

  function zoom(factor, x = width / 2, y = height / 2) {
    const before = { x: (x - width / 2) / view.scale, y: (y - height / 2) / view.scale };
    view.scale = Math.max(0.4 * fitScale(), Math.min(view.scale * factor, smallest() * 2 ** MAX_LEVEL));
    view.x += before.x - (x - width / 2) / view.scale;
    view.y += before.y - (y - height / 2) / view.scale;
    keepInside();
    redraw();
  }

  function pan(dx, dy) {
    view.x -= dx / view.scale;
    view.y -= dy / view.scale;
    keepInside();
    redraw();
  }

  function keepInside() {
    view.x = Math.max(-0.1, Math.min(1.1, view.x));
    view.y = Math.max(-0.1, Math.min(1.1, view.y));
  }

  function showAll() {
    view.x = (bounds.left + bounds.right) / 2;
    view.y = (bounds.top + bounds.bottom) / 2;
    view.scale = fitScale();
    redraw();
  }

  function bringIntoView(i) {
    const margin = 60;
    const x = screenX(i);
    const y = screenY(i);
    if (x < margin || y < margin || x > width - margin || y > height - margin) {
      view.x = xs[i];
      view.y = ys[i];
    }
  }

  /** The image under a point of the canvas, or null: thumbnails are as large as they are drawn. */
  function imageAt(x, y, reach = smallest() / 2 + 4) {
    const wx = (x - width / 2) / view.scale + view.x;
    const wy = (y - height / 2) / view.scale + view.y;
    const cells = Math.ceil(reach / view.scale * GRID);
    let best = null;
    let nearest = reach;
    const look = (i) => {
      if (marked && !marked.has(i) && i !== selected) return;
      const distance = Math.max(Math.abs(screenX(i) - x), Math.abs(screenY(i) - y));
      if (distance < nearest) { nearest = distance; best = i; }
    };
    if (cells > 24) { ALL.forEach(look); return best; }
    for (let column = -cells; column <= cells; column++) {
      for (let row = -cells; row <= cells; row++) {
        for (const i of grid.get(cellKey(wx + column / GRID, wy + row / GRID, GRID)) ?? []) look(i);
      }
    }
    return best;
  }

  // ---- Pointer and keys -------------------------------------------------------------------------

  const pointers = new Map();
  let moved = 0;

  function at(event) {
    const box = canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  }

  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    if (pointers.size === 0) moved = 0;
    pointers.set(event.pointerId, at(event));
    canvas.classList.add("dragging");
    $("hover").hidden = true;
  });

  canvas.addEventListener("pointermove", (event) => {
    const now = at(event);
    const before = pointers.get(event.pointerId);
    if (!before) return hover(now);
    if (pointers.size === 2) {
      const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, point]) => point);
      const middle = { x: (now.x + other.x) / 2, y: (now.y + other.y) / 2 };
      const distance = (point) => Math.max(10, Math.hypot(point.x - other.x, point.y - other.y));
      pan((now.x - before.x) / 2, (now.y - before.y) / 2);
      zoom(distance(now) / distance(before), middle.x, middle.y);
    } else {
      pan(now.x - before.x, now.y - before.y);
    }
    moved += Math.abs(now.x - before.x) + Math.abs(now.y - before.y);
    pointers.set(event.pointerId, now);
  });

  function release(event) {
    if (!pointers.delete(event.pointerId)) return;
    if (pointers.size === 0) canvas.classList.remove("dragging");
    if (event.type === "pointerup" && moved < 6) {
      const { x, y } = at(event);
      const i = imageAt(x, y);
      if (i !== null) select(i, false);
    }
  }
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => { $("hover").hidden = true; });

  function hover({ x, y }) {
    const i = imageAt(x, y);
    canvas.style.cursor = i === null ? "" : "pointer";
    const box = $("hover");
    box.hidden = i === null;
    if (i === null) return;
    box.textContent = data.names[i];
    box.style.left = `${Math.min(x + 14, Math.max(0, width - 250))}px`;
    box.style.top = `${Math.min(y + 14, height - 40)}px`;
  }

  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const { x, y } = at(event);
    // Lines and pages of a mouse wheel count as pixels of a touch pad.
    const pixels = event.deltaY * [1, 16, 400][event.deltaMode];
    zoom(Math.exp(-Math.max(-120, Math.min(120, pixels)) * 0.0025), x, y);
  }, { passive: false });

  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = 60;
    const actions = {
      ArrowLeft: () => pan(step, 0), ArrowRight: () => pan(-step, 0),
      ArrowUp: () => pan(0, step), ArrowDown: () => pan(0, -step),
      "+": () => zoom(1.3), "=": () => zoom(1.3), "-": () => zoom(1 / 1.3),
      0: showAll, Home: showAll,
      Enter: () => { const i = imageAt(width / 2, height / 2, Math.max(width, height)); if (i !== null) select(i, false); },
      Escape: () => { select(null); mark(null); },
    };
    const action = actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
  $("closer").addEventListener("click", () => zoom(1.5));
  $("farther").addEventListener("click", () => zoom(1 / 1.5));
  $("all").addEventListener("click", showAll);

  // ---- Marking and selecting --------------------------------------------------------------------

  function mark(images, what = "") {
    marked = images && images.length ? new Set(images) : null;
    spacedMarked = new Map();
    $("marked").hidden = marked === null;
    $("marked").firstElementChild.textContent = what;
    redraw();
  }
  $("unmark").addEventListener("click", () => { mark(null); canvas.focus(); });

  function select(i, move = true) {
    selected = i;
    if (i !== null) {
      if (marked && !marked.has(i)) mark(null);
      if (move) bringIntoView(i);
      $("spoken").textContent = `Selected ${data.names[i]}, cluster ${data.clusters[i] + 1}`;
    }
    if (i !== null || tab === "image") show("image");
    redraw();
  }

  // ---- Panel ------------------------------------------------------------------------------------

  const clusterSizes = [];
  for (const cluster of data.clusters) clusterSizes[cluster] = (clusterSizes[cluster] ?? 0) + 1;
  const members = clusterSizes.map(() => []);
  for (const i of ALL) members[data.clusters[i]].push(i);
  for (const images of members) images.sort((a, b) => data.clusterSimilarity[b] - data.clusterSimilarity[a]);
  let threshold = data.threshold;
  let tab = "image";
  let openCluster = null;

  const tabs = {
    image: { title: "Image", fill: fillImage },
    clusters: { title: "Clusters", fill: fillClusters },
    duplicates: { title: "Duplicates", fill: fillDuplicates },
    outliers: { title: "Outliers", fill: fillOutliers },
  };
  if (data.unreadable.length) tabs.unreadable = { title: "Unreadable", fill: fillUnreadable };
  for (const [name, { title }] of Object.entries(tabs)) {
    const button = element("button", { type: "button", textContent: title, id: `tab-${name}`, role: "tab", aria: { controls: "view" } });
    button.addEventListener("click", () => { if (name !== "image") mark(null); show(name); });
    $("tabs").append(button);
  }
  $("tabs").addEventListener("keydown", (event) => {
    const names = Object.keys(tabs);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = names[(names.indexOf(tab) + step + names.length) % names.length];
    show(next);
    $(`tab-${next}`).focus();
  });

  function show(name, again = false) {
    const top = again && tab === name ? $("view").scrollTop : 0;
    tab = name;
    for (const button of $("tabs").children) {
      const current = button.id === `tab-${name}`;
      button.setAttribute("aria-selected", current);
      button.tabIndex = current ? 0 : -1;
    }
    // The results of a search have no tab of their own: the keyboard needs a way back.
    if (!$(`tab-${name}`)) $("tabs").firstElementChild.tabIndex = 0;
    $("view").setAttribute("aria-labelledby", `tab-${name}`);
    $("view").replaceChildren();
    tabs[name].fill($("view"));
    $("view").scrollTop = top;
  }

  function paragraph(text, className = "faint") {
    return element("p", { textContent: text, className });
  }

  function heading(text) {
    return element("h2", { textContent: text });
  }

  /** The address of an image's file, or null where it has none. */
  function fileAddress(i) {
    if (!data.root) return null;
    const path = `${data.root}/${data.names[i]}`.replaceAll("\\", "/");
    try {
      return "file://" + (path.startsWith("/") ? "" : "/") + path.split("/").map(encodeURIComponent).join("/");
    } catch {
      return null;  // a name that is not Unicode
    }
  }

  function preview(i) {
    const small = picture([i], data.side);
    small.className = "preview";
    small.setAttribute("role", "img");
    small.setAttribute("aria-label", `Thumbnail of ${data.names[i]}`);
    const address = fileAddress(i);
    if (!address) return small;
    const large = new Image();
    large.alt = data.names[i];
    large.className = "preview";
    // The file may be gone, or the page on another machine: then the thumbnail stays.
    large.onload = () => small.replaceWith(large);
    large.src = address;
    return small;
  }

  function fillImage(box) {
    if (selected === null) {
      box.append(
        paragraph("Select an image on the map, or search for a file name.", ""),
        paragraph("Drag to move, scroll or pinch to zoom. Similar images lie close to each other; the map has its own distances, so compare neighbors here."),
      );
      return;
    }
    const i = selected;
    const cluster = data.clusters[i];
    const open = element("button", { type: "button", textContent: `${cluster + 1} (${counted(clusterSizes[cluster], "image")})` });
    open.addEventListener("click", () => { openCluster = cluster; markCluster(cluster); show("clusters"); });
    const facts = element("dl", {}, element("dt", { textContent: "Cluster" }), element("dd", {}, open));
    const fact = (name, text) => facts.append(element("dt", { textContent: name }), element("dd", { textContent: text }));
    if (data.labels && data.labels.names[data.labels.of[i]]) fact("Label", data.labels.names[data.labels.of[i]]);
    fact("Outlier score", `${share(data.outlier[i]).toFixed(3)}, higher than that of ${Math.round(100 * ranks[i])} % of the images`);
    box.append(preview(i), element("p", { className: "name", textContent: data.names[i] }), facts);
    const copies = data.pairs.flatMap(([a, b], p) => (share(data.correlation[p]) >= threshold && (a === i || b === i) ? [[a === i ? b : a, data.correlation[p]]] : []));
    if (copies.length) {
      box.append(heading("Near duplicates"), gridOf(copies.map(([j]) => j), (j) => percent(copies.find(([k]) => k === j)[1])));
    }
    box.append(heading("Nearest neighbors"));
    const near = data.neighbors[i];
    box.append(near.length ? gridOf(near, (j) => share(data.similarity[i][near.indexOf(j)]).toFixed(3)) : paragraph("There is no other image."));
    if (near.length) box.append(paragraph("Numbers are cosines of the features; 1 is the same."));
  }

  function markCluster(cluster) {
    mark(members[cluster], `Cluster ${cluster + 1}`);
  }

  function fillClusters(box) {
    box.append(paragraph(`${counted(clusterSizes.length, "cluster")}, the largest first, by k-means on the features. Select one to see it on the map.`));
    members.forEach((images, cluster) => {
      const row = element("button", { type: "button", className: "row", aria: { expanded: cluster === openCluster } });
      const swatch = element("span", { className: "swatch" });
      swatch.style.background = colorOf("cluster", cluster);
      const strip = picture(images.slice(0, 6), 56);
      // A cluster of two must not be drawn as large as one of six.
      strip.style.width = `${100 * Math.min(images.length, 6) / 6}%`;
      row.append(swatch, `Cluster ${cluster + 1}: ${counted(images.length, "image")}`, strip);
      row.addEventListener("click", () => {
        openCluster = openCluster === cluster ? null : cluster;
        if (openCluster === null) mark(null); else markCluster(cluster);
        show("clusters", true);
      });
      box.append(row);
      if (cluster !== openCluster) return;
      box.append(heading("Most typical"), gridOf(images.slice(0, 12)));
      if (images.length > 24) box.append(heading("Least typical"), gridOf(images.slice(-12).reverse()));
      if (images.length > 12) {
        const all = element("button", { type: "button", textContent: `All ${images.length.toLocaleString("en")}` });
        all.addEventListener("click", () => all.replaceWith(gridOf(images)));
        box.append(element("p", {}, all));
      }
      box.append(saver("Save file names", `cluster_${cluster + 1}.csv`, () => images.map((i) => [data.names[i]]), ["name"]));
    });
  }

  function duplicateGroups() {
    const parent = new Map();
    const find = (i) => {
      let root = i;
      while (parent.has(root) && parent.get(root) !== root) root = parent.get(root);
      parent.set(i, root);
      return root;
    };
    data.pairs.forEach(([a, b], p) => { if (share(data.correlation[p]) >= threshold - 1e-9) parent.set(find(a), find(b)); });
    const groups = new Map();
    for (const i of [...parent.keys()].sort((a, b) => a - b)) {
      const root = find(i);
      if (!groups.has(root)) groups.set(root, []);
      groups.get(root).push(i);
    }
    return [...groups.values()].filter((group) => group.length > 1).sort((a, b) => b.length - a.length);
  }

  function fillDuplicates(box) {
    const range = element("input", { type: "range", min: data.lowestThreshold, max: 1, step: 0.005, value: threshold, id: "threshold" });
    const value = element("output", { textContent: Number(threshold).toFixed(3) });
    const list = element("div");
    const fill = () => {
      const groups = duplicateGroups();
      const copies = groups.reduce((sum, group) => sum + group.length - 1, 0);
      list.replaceChildren(paragraph(groups.length ? `${counted(groups.length, "group")}; ${counted(copies, "image")} could go.` : "No near duplicates at this threshold.", ""));
      if (!groups.length) return;
      list.append(saver("Save groups", "duplicates.csv", () => groups.flatMap((group, g) => group.map((i) => [g + 1, data.names[i]])), ["group", "name"]));
      let shown = 0;
      const more = element("button", { type: "button" });
      const grow = () => {
        for (const group of groups.slice(shown, shown + 40)) more.before(element("div", { className: "group" }, gridOf(group, undefined, 12)));
        shown += 40;
        more.hidden = shown >= groups.length;
        more.textContent = `Show more of ${groups.length} groups`;
      };
      more.addEventListener("click", grow);
      list.append(more);
      grow();
    };
    range.addEventListener("input", () => {
      threshold = Number(range.value);
      value.textContent = threshold.toFixed(3);
      fill();
    });
    box.append(
      paragraph("The same picture again, resized or encoded anew: the correlation of small grey versions reaches the threshold."),
      element("label", { className: "range" }, "Threshold", range, value),
      list,
    );
    fill();
  }

  function fillOutliers(box) {
    box.append(
      paragraph("Images that are far from their nearest neighbors: 1 minus the mean cosine. Look here for broken, mislabeled or rare images."),
      saver("Save all scores", "outliers.csv", () => byOutlier.map((i) => [data.names[i], share(data.outlier[i])]), ["name", "score"]),
      gridOf(byOutlier, (i) => share(data.outlier[i]).toFixed(3)),
    );
  }

  function fillUnreadable(box) {
    const list = element("ul");
    for (const [name, reason] of data.unreadable.slice(0, 500)) list.append(element("li", {}, element("span", { className: "name", textContent: name }), `: ${reason}`));
    box.append(
      paragraph(`${counted(data.unreadable.length, "image")} could not be read and ${data.unreadable.length === 1 ? "is" : "are"} not on the map.`),
      saver("Save list", "unreadable.csv", () => data.unreadable, ["name", "reason"]),
      list,
    );
  }

  /** A button that saves rows as CSV. */
  function saver(text, name, rows, header) {
    const button = element("button", { type: "button", textContent: text });
    button.addEventListener("click", () => {
      const quote = (cell) => (/[",\r\n]/.test(cell) ? `"${String(cell).replaceAll('"', '""')}"` : cell);
      const csv = [header, ...rows()].map((row) => row.map(quote).join(",")).join("\r\n") + "\r\n";
      const link = element("a", { download: name, href: URL.createObjectURL(new Blob([csv], { type: "text/csv" })) });
      link.click();
      URL.revokeObjectURL(link.href);
    });
    return element("p", {}, button);
  }

  // ---- Search, choices, theme -------------------------------------------------------------------

  const lower = data.names.map((name) => name.toLowerCase());
  tabs.search = { title: "Search", fill: fillSearch };
  let found = [];

  function search() {
    const words = $("query").value.toLowerCase().split(/\s+/).filter(Boolean);
    found = words.length ? ALL.filter((i) => words.every((word) => lower[i].includes(word))) : [];
    if (!words.length) {
      mark(null);
      if (tab === "search") show("image");
      return;
    }
    mark(found, found.length ? `${counted(found.length, "image")} found` : "");
    $("spoken").textContent = `${counted(found.length, "image")} found`;
    show("search");
  }

  function fillSearch(box) {
    box.append(paragraph(found.length ? `${counted(found.length, "image")} found` : "No file name has all of these words.", ""));
    if (found.length) box.append(gridOf(found));
  }
  $("query").addEventListener("input", search);
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    if (found.length) select(found[0]);
  });

  data.maps.forEach(({ title }, number) => $("map").append(element("option", { value: number, textContent: title })));
  $("map").addEventListener("change", () => setMap(Number($("map").value)));
  for (const [name, { title }] of Object.entries(colorings)) $("color").append(element("option", { value: name, textContent: title }));
  $("color").addEventListener("change", () => { coloring = $("color").value; recolor(); });

  function setTheme(theme) {
    document.documentElement.dataset.theme = theme;
    $("theme").textContent = theme === "dark" ? "\u2600" : "\u263e";
    $("theme").setAttribute("aria-label", theme === "dark" ? "Light colors" : "Dark colors");
    recolor();
  }
  const system = matchMedia("(prefers-color-scheme: dark)");
  system.addEventListener("change", () => { setTheme(system.matches ? "dark" : "light"); show(tab, true); });
  $("theme").addEventListener("click", () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    show(tab, true);
  });

  // ---- Start ------------------------------------------------------------------------------------

  document.title = data.title;
  $("title").textContent = data.title;
  const number = N < data.total ? `${N.toLocaleString("en")} of ${counted(data.total, "image")}` : counted(N, "image");
  $("facts").textContent = `${number}, ${counted(clusterSizes.length, "cluster")}, features of ${data.weights}`;
  setTheme(system.matches ? "dark" : "light");
  setMap(0);
  new ResizeObserver(resize).observe($("stage"));
  resize();
  decodeSheets().then(() => {
    show(tab, true);
    redraw();
    document.documentElement.dataset.ready = "true";
  });
  // For scripts that measure or test the page.
  window.explore = { data, view, frames, select, pan, zoom, showAll, screenOf: (i) => [screenX(i), screenY(i)] };
})();
