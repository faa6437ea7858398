"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const make = (tag, props = {}, ...children) => {
    const e = Object.assign(document.createElement(tag), props);
    e.append(...children);
    return e;
  };
  const svg = (tag, attributes = {}, text = null) => {
    const e = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [k, v] of Object.entries(attributes)) e.setAttribute(k, v);
    if (text !== null) e.textContent = text;
    return e;
  };
  const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
  const short = (x, digits = 2) => (x === 0 ? "0" : Math.abs(x) >= 1000 || Math.abs(x) < 1e-4 ? x.toExponential(1) : String(+x.toPrecision(digits)));
  const ink = (label) => `ink-${data.inks[label]}`;

  // Tables: a click on a heading sorts by it, a second one the other way round.
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, i) => head.querySelector("button")?.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const numeric = head.classList.contains("n");
      const first = numeric && /higher|index/.test(head.textContent) ? "descending" : "ascending";
      const way = now === null ? first : now === "ascending" ? "descending" : "ascending";
      heads.forEach((h) => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", way);
      const value = (row) => row.cells[i].dataset.value;
      const sign = way === "ascending" ? 1 : -1;
      const body = table.tBodies[0];
      body.append(...[...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === ""); // what has no value stays last
        return sign * (numeric ? x - y : x.localeCompare(y));
      }));
    }));
  }

  // Tooltip
  const tip = $("tip");
  const showTip = (event, text) => {
    tip.textContent = text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${clamp(event.clientX + 14, 8, innerWidth - width - 8)}px`;
    tip.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 12 : event.clientY + 18}px`;
  };
  const hideTip = () => { tip.hidden = true; };

  // Colour: lightness grows evenly with the square root of a weight; warm for positive ones, cool for negative ones.
  const oklch = (L, C, h) => {
    const [a, b] = [C * Math.cos(h * Math.PI / 180), C * Math.sin(h * Math.PI / 180)];
    const [l, m, s] = [L + 0.3963377774 * a + 0.2158037573 * b, L - 0.1055613458 * a - 0.0638541728 * b, L - 0.0894841775 * a - 1.291485548 * b].map((x) => x ** 3);
    return [4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s, -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s, -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s]
      .map((x) => Math.round(255 * clamp(x <= 0.0031308 ? 12.92 * x : 1.055 * x ** (1 / 2.4) - 0.055, 0, 1)));
  };
  const along = (stops, t) => {
    const x = t * (stops.length - 1), i = Math.min(Math.floor(x), stops.length - 2);
    return stops[i] + (stops[i + 1] - stops[i]) * (x - i);
  };
  const ramp = (hues, chroma) => Array.from({ length: 256 }, (_, i) => {
    const t = i / 255;
    return oklch(0.155 + 0.815 * t, along(chroma, t), along(hues, t));
  });
  const warm = ramp([285, 300, 345, 385, 415, 458], [0.035, 0.13, 0.185, 0.175, 0.15, 0.09]);
  const cool = ramp([285, 270, 250, 225, 200, 185], [0.035, 0.11, 0.13, 0.125, 0.11, 0.06]);
  const colour = (t) => (t < 0 ? cool : warm)[Math.round(255 * Math.min(1, Math.sqrt(Math.abs(t))))];
  const css = (t) => `rgb(${colour(t).join(" ")})`;

  // Maps travel as zlib-compressed signed bytes on a square-root scale.
  const unpack = async (layer) => {
    const bytes = Uint8Array.from(atob(layer.data), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const packed = new Int8Array(await new Response(stream).arrayBuffer());
    const size = layer.n * layer.m;
    const heads = layer.scale.map((scale, h) => Float32Array.from(
      packed.subarray(h * size, (h + 1) * size), (b) => Math.sign(b) * (b / 127) ** 2 * scale));
    const mean = new Float32Array(size);
    for (const head of heads) head.forEach((w, i) => { mean[i] += w / heads.length; });
    return { n: layer.n, m: layer.m, maps: [mean, ...heads] }; // 0 is the mean, then the heads
  };
  // The weight that is drawn brightest. Single weights of 1 (the first rows of a causal map) would leave all else dark,
  // and a map that reads everything alike has nothing to be bright.
  const top = (map) => map.top ??= (() => {
    const sizes = Float32Array.from(map, Math.abs).filter((w) => w > 0).sort();
    if (!sizes.length) return 1;
    return Math.max(sizes[Math.floor(0.985 * (sizes.length - 1))], 4 * sizes.reduce((a, b) => a + b) / sizes.length);
  })();
  const paint = (canvas, layer, map, bright) => {
    canvas.width = layer.m;
    canvas.height = layer.n;
    const context = canvas.getContext("2d"), image = context.createImageData(layer.m, layer.n);
    for (let i = 0; i < map.length; i++) {
      const [r, g, b] = colour(map[i] / (bright === "row" ? rowTop(layer, map, Math.floor(i / layer.m)) : bright));
      image.data.set([r, g, b, 255], 4 * i);
    }
    context.putImageData(image, 0, 0);
  };
  const rowTop = (layer, map, row) => {
    map.tops ??= [];
    return map.tops[row] ??= Math.max(1e-12, ...map.subarray(row * layer.m, (row + 1) * layer.m).map(Math.abs));
  };
  // How many keys a query reads: the exponential of the entropy of its weights' shares, in the mean over queries.
  const breadth = (layer, map) => {
    let total = 0;
    for (let i = 0; i < layer.n; i++) {
      const row = map.subarray(i * layer.m, (i + 1) * layer.m);
      let sum = 0, entropy = 0;
      for (const w of row) sum += Math.abs(w);
      for (const w of row) if (w && sum) entropy -= (Math.abs(w) / sum) * Math.log(Math.abs(w) / sum);
      total += Math.exp(entropy);
    }
    return total / layer.n;
  };

  const looks = async () => {
    const tasks = data.tasks.map((t) => ({ ...t, rows: t.rows.filter((r) => r.maps) })).filter((t) => t.rows.length);
    if (!tasks.length) return;
    $("looks").hidden = false;
    const now = { task: null, row: null, layer: 0, head: 1, query: 0, bright: "own" };
    const current = () => now.row.layers[Math.min(now.layer, now.row.layers.length - 1)];
    const map = () => current().maps[Math.min(now.head, current().maps.length - 1)];
    const limit = () => (now.bright === "all" ? now.task.limit : top(map()));

    const segments = (id, options, key, changed) => $(id).replaceChildren(...options.map(([value, text]) =>
      make("button", { type: "button", textContent: text, ariaPressed: String(now[key] === value), onclick: () => { now[key] = value; changed(); } })));
    const visible = (text) => ({ " ": "␣", "\n": "⏎", "\\n": "⏎", "\t": "⇥", "\\t": "⇥" }[text] ?? text);
    const name = (labels, i) => labels[i] === undefined ? String(i) : visible(labels[i]);
    const letters = (labels) => labels.length > 0 && labels.reduce((sum, t) => sum + t.length, 0) / labels.length <= 2;
    const chosen = () => now.task.rows.find((r) => r.label === now.row.label).maps;

    const axis = (element, labels, count, vertical) => {
      const all = letters(labels), most = vertical ? 12 : labels.some((t) => t.length > 6) ? 3 : 6, step = all ? 1 : Math.ceil(count / most);
      element.replaceChildren(...Array.from({ length: count }, (_, i) => i).filter((i) => i % step === 0).map((i) => {
        const e = make("span", { textContent: name(labels, i) });
        e.style[vertical ? "top" : "left"] = `${100 * (i + 0.5) / count}%`;
        return e;
      }));
    };

    const drawLens = () => {
      const layer = current(), m = map(), { rows, columns } = chosen();
      now.query = clamp(now.query, 0, layer.n - 1);
      const bright = now.bright === "row" ? "row" : limit();
      paint($("map"), layer, m, bright);
      $("stage").style.aspectRatio = String(clamp(layer.m / layer.n, 0.8, 2));
      $("stage").setAttribute("aria-label", `Attention of ${now.row.label}, layer ${now.layer + 1}: ${layer.n} tokens that ask, ${layer.m} that are read`);
      axis($("axis-y"), rows, layer.n, true);
      axis($("axis-x"), columns, layer.m, false);
      $("axis-y").classList.toggle("wide", !letters(rows) && rows.some((r) => r.length > 6));
      const signed = m.some((w) => w < 0), bar = $("scale"), context = bar.getContext("2d");
      for (let x = 0; x < 256; x++) {
        const t = signed ? x / 127.5 - 1 : x / 255;
        context.fillStyle = css(Math.sign(t) * t * t);
        context.fillRect(x, 0, 1, 1);
      }
      const high = bright === "row" ? "the row's largest" : short(limit());
      $("scale-low").textContent = signed ? `−${high}` : "0";
      $("scale-high").textContent = high;
      drawQuery();
    };

    const drawQuery = (column = null) => {
      const layer = current(), m = map(), { rows, columns, image } = chosen();
      const read = m.subarray(now.query * layer.m, (now.query + 1) * layer.m);
      const most = Math.max(1e-12, ...read.map(Math.abs));
      const mark = $("row-mark").style, cross = $("column-mark").style;
      [mark.top, mark.height] = [`${100 * now.query / layer.n}%`, `${100 / layer.n}%`];
      cross.opacity = column === null ? "0" : "1";
      [cross.left, cross.width] = [`${100 * (column ?? 0) / layer.m}%`, `${100 / layer.m}%`];
      $("asks").replaceChildren("Token ", make("b", { textContent: name(rows, now.query) }), ` (${now.query + 1} of ${layer.n}) reads about `,
        make("b", { textContent: String(Math.round(breadth({ n: 1, m: layer.m }, read))) }), ` of ${layer.m}`);
      const example = $("example"), pixels = image && image.length * image[0].length === layer.m;
      if (pixels) drawPixels(example, image, read, most, layer);
      else if (letters(columns)) drawTokens(example, rows, columns, read, most, layer);
      else drawBars(example, columns, read, most);
      const order = [...read.keys()].sort((a, b) => Math.abs(read[b]) - Math.abs(read[a])).slice(0, 4);
      $("top-reads").replaceChildren("Most: ", ...order.flatMap((j, i) => [i ? "  " : "", make("b", { textContent: name(columns, j) }), ` ${short(read[j])}`]));
      $("peers-title").textContent = `The same token in every mechanism, layer ${now.layer + 1}, mean of heads`;
      drawPeers(pixels ? image : null);
    };

    // The same token in every mechanism, in the mean over the heads of this layer.
    const drawPeers = (image) => {
      $("peers").className = image ? "peers tiles" : "peers";
      $("peers").replaceChildren(...now.task.drawn.map((row) => {
        const layer = row.layers[Math.min(now.layer, row.layers.length - 1)], canvas = make("canvas");
        const i = Math.min(now.query, layer.n - 1), read = layer.maps[0].slice(i * layer.m, (i + 1) * layer.m);
        const flat = image && image.length * image[0].length === layer.m ? { n: image.length, m: image[0].length } : { n: 1, m: layer.m };
        paint(canvas, flat, read, top(read));
        const button = make("button", { type: "button", title: row.label, onclick: () => { now.row = row; draw(); } }, canvas, make("span", { textContent: row.label.split("(")[0] }));
        if (row === now.row) button.dataset.on = "";
        return button;
      }));
    };

    const drawPixels = (example, image, read, most, layer) => {
      const [height, width] = [image.length, image[0].length];
      const picture = (caption, shade, choose) => {
        const canvas = make("canvas", { width, height }), context = canvas.getContext("2d");
        canvas.style.aspectRatio = `${width} / ${height}`;
        for (let i = 0; i < width * height; i++) {
          context.fillStyle = shade(i);
          context.fillRect(i % width, Math.floor(i / width), 1, 1);
        }
        const frame = make("div", { className: choose ? "frame choose" : "frame" }, canvas);
        if (layer.n === width * height) {
          const dot = make("i");
          Object.assign(dot.style, { left: `${100 * (now.query % width) / width}%`, top: `${100 * Math.floor(now.query / width) / height}%`, width: `${100 / width}%`, height: `${100 / height}%` });
          frame.append(dot);
          frame.addEventListener("pointerdown", (event) => {
            const box = canvas.getBoundingClientRect();
            const x = Math.floor(width * (event.clientX - box.left) / box.width), y = Math.floor(height * (event.clientY - box.top) / box.height);
            now.query = clamp(y, 0, height - 1) * width + clamp(x, 0, width - 1);
            drawQuery();
          });
        }
        return make("figure", {}, frame, make("figcaption", { textContent: caption }));
      };
      example.replaceChildren(make("div", { className: "pixels" },
        picture("The image. Choose a pixel.", (i) => `rgb(${Array(3).fill(image[Math.floor(i / width)][i % width]).join(" ")})`, true),
        picture("What that pixel reads", (i) => css(read[i] / most), true)));
    };

    const drawTokens = (example, rows, columns, read, most, layer) => {
      const asking = make("div", { className: "tokens ask" }, ...Array.from({ length: layer.n }, (_, i) => make("span", {
        textContent: rows[i] === " " ? "\u00a0" : name(rows, i), className: `${i === now.query ? "now" : ""} ${name(rows, i).length > 1 ? "word" : ""}`, onclick: () => { now.query = i; drawQuery(); },
      })));
      const reading = make("div", { className: "tokens" }, ...Array.from(read, (w, j) => {
        const e = make("span", { textContent: columns[j] === " " ? "\u00a0" : name(columns, j), title: short(w) });
        const [r, g, b] = colour(w / most);
        e.style.background = `rgb(${r} ${g} ${b})`;
        e.style.color = 0.3 * r + 0.59 * g + 0.11 * b > 128 ? "#14111f" : "#f3f0ff";
        return e;
      }));
      example.replaceChildren(make("p", { className: "token-title", textContent: "Asks (choose a token)" }), asking, make("p", { className: "token-title", textContent: "Is read" }), reading);
    };

    const drawBars = (example, columns, read, most) => {
      const bars = make("div", { className: "bars" }, ...Array.from(read, (w, j) => {
        const e = make("i", { title: `${name(columns, j)}: ${short(w)}` });
        e.style.setProperty("--h", `${Math.max(1, 96 * Math.abs(w) / most)}%`);
        e.style.setProperty("--c", css(w / most || 0.02));
        return e;
      }));
      const ends = [0, Math.floor(read.length / 2), read.length - 1];
      example.replaceChildren(bars, make("div", { className: "bars-axis" }, ...ends.map((j) => make("span", { textContent: name(columns, j) }))));
    };

    const drawSheet = () => {
      $("sheet").replaceChildren(...now.task.drawn.map((row) => {
        const strip = make("div", { className: "strip-row" });
        if (row === now.row) strip.dataset.on = "";
        const wide = row.layers.flatMap((layer) => layer.maps.slice(1).map((m) => breadth(layer, m)));
        const [least, most] = [Math.min(...wide), Math.max(...wide)].map((x) => short(x));
        const spread = wide.length ? `reads ${least === most ? most : `${least} to ${most}`} of ${row.layers[0].m} tokens` : "";
        const source = now.task.rows.find((r) => r.label === row.label);
        const title = make("h3", {}, make("i", { className: `ink ${ink(row.label)}` }), make("span", {}, source.id, make("small", { textContent: source.options })));
        const text = source.mean === null ? "" : `${now.task.metric} ${short(source.mean, 3)}`;
        strip.append(make("div", {}, title, make("p", {}, text, make("br"), spread)));
        const layers = make("div", { className: "layers" }, ...row.layers.map((layer, l) => {
          const heads = layer.maps.slice(1);
          const thumbs = make("div", { className: "thumbs" }, ...heads.map((m, h) => {
            const canvas = make("canvas");
            paint(canvas, layer, m, now.bright === "row" ? "row" : now.bright === "all" ? now.task.limit : top(m));
            const pressed = row === now.row && l === now.layer && h + 1 === now.head;
            const button = make("button", { type: "button", title: `layer ${l + 1}, head ${h + 1}`, ariaPressed: String(pressed), onclick: () => {
              Object.assign(now, { row, layer: l, head: h + 1 });
              draw();
              if (innerWidth <= 860) $("tabs").scrollIntoView({ behavior: "smooth", block: "start" });
            } }, canvas);
            button.style.aspectRatio = String(clamp(layer.m / layer.n, 0.8, 2));
            return button;
          }));
          thumbs.style.setProperty("--n", Math.min(heads.length, 8));
          return make("div", { className: "layer" }, make("span", { textContent: `layer ${l + 1}` }), thumbs);
        }));
        strip.append(layers);
        return strip;
      }));
    };

    const draw = () => {
      segments("layers", now.row.layers.map((_, i) => [i, String(i + 1)]), "layer", draw);
      segments("heads", current().maps.map((_, i) => [i, i ? String(i) : "mean"]), "head", draw);
      segments("scales", [["own", "each map"], ["all", "one for all"], ["row", "each row"]], "bright", draw);
      $("pick").replaceChildren(...now.task.drawn.map((row) => make("option", { textContent: row.label, selected: row === now.row })));
      for (const tab of $("tabs").children) tab.ariaSelected = String(tab.dataset.task === now.task.name);
      drawLens();
      drawSheet();
    };
    const open = async (task) => {
      task.drawn ??= await Promise.all(task.rows.map(async (row) => ({ label: row.label, layers: await Promise.all(row.maps.layers.map(unpack)) })));
      task.limit ??= Math.max(...task.drawn.flatMap((row) => row.layers.flatMap((layer) => layer.maps.slice(1).map(top))));
      // The first row that is no baseline is the best mechanism.
      const row = task.drawn.find((_, i) => !task.rows[i].baseline) ?? task.drawn[0];
      Object.assign(now, { task, row, layer: row.layers.length - 1, head: 1, query: Math.floor(0.55 * row.layers[0].n) });
      draw();
    };

    $("tabs").replaceChildren(...tasks.map((task) => {
      const tab = make("button", { type: "button", role: "tab", onclick: () => open(task) }, task.title + " ", make("span", { textContent: task.name }));
      tab.dataset.task = task.name;
      return tab;
    }));
    $("pick").onchange = (event) => { now.row = now.task.drawn[event.target.selectedIndex]; draw(); };
    const stage = $("stage");
    stage.addEventListener("pointermove", (event) => {
      const layer = current(), box = stage.getBoundingClientRect(), { rows, columns } = chosen();
      now.query = clamp(Math.floor(layer.n * (event.clientY - box.top) / box.height), 0, layer.n - 1);
      const column = clamp(Math.floor(layer.m * (event.clientX - box.left) / box.width), 0, layer.m - 1);
      drawQuery(column);
      showTip(event, `${name(rows, now.query)} reads ${name(columns, column)}: ${short(map()[now.query * layer.m + column])}`);
    });
    stage.addEventListener("pointerleave", () => { hideTip(); drawQuery(); });
    stage.addEventListener("keydown", (event) => {
      const way = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!way) return;
      event.preventDefault();
      now.query += way;
      now.query = clamp(now.query, 0, current().n - 1);
      drawQuery();
    });
    await open(tasks[0]);
  };

  // Charts
  const metricPrefix = (x) => {
    for (const [s, p] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) if (x >= s) return `${+(x / s).toPrecision(3)} ${p}`;
    return String(+x.toPrecision(3));
  };
  const time = (x) => (x >= 1 ? `${+x.toPrecision(3)} s` : x >= 1e-3 ? `${+(x * 1e3).toPrecision(3)} ms` : `${+(x * 1e6).toPrecision(3)} µs`);
  const COSTS = {
    step_ms: ["time a step", (x) => time(x / 1e3)],
    memory: ["memory", (x) => `${metricPrefix(x)}B`],
    flops: ["FLOPs a step", metricPrefix],
    parameters: ["parameters", metricPrefix],
  };
  const niceLinear = (low, high) => {
    const raw = (high - low) / 5, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((s) => s >= raw);
    const ticks = [];
    for (let t = Math.ceil(low / step) * step; t <= high + 1e-9 * step; t += step) ticks.push(+t.toPrecision(12));
    return ticks;
  };
  const niceLog = (low, high, base = 10) => {
    const ticks = [], decades = Math.log10(high / low);
    const steps = base === 2 ? [1] : decades > 2.5 ? [1] : decades > 1 ? [1, 3] : [1, 1.5, 2, 3, 5, 7];
    for (let p = Math.floor(Math.log(low) / Math.log(base)); base ** p <= high * 1.001; p++) for (const s of steps) {
      const t = s * base ** p;
      if (t >= low * 0.999 && t <= high * 1.001) ticks.push(t);
    }
    return ticks;
  };
  const axes = ({ title, x, y, xTicks, yTicks, xText, yText, xName, yName, width, height, left, bottom }) => {
    const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
    chart.append(svg("title", {}, title));
    for (const t of yTicks) {
      chart.append(svg("line", { class: "grid", x1: left, x2: width - 8, y1: y(t), y2: y(t) }));
      chart.append(svg("text", { x: left - 8, y: y(t) + 4, "text-anchor": "end" }, yText(t)));
    }
    let last = -Infinity;
    for (const t of xTicks.filter((t) => x(t) - last > 52 && (last = x(t)))) {
      chart.append(svg("text", { x: x(t), y: height - bottom + 20, "text-anchor": "middle" }, xText(t)));
    }
    chart.append(svg("text", { x: width - 8, y: height - 6, "text-anchor": "end" }, xName));
    chart.append(svg("text", { x: 0, y: 14 }, yName));
    return chart;
  };

  // Narrow screens get a narrower chart rather than smaller letters.
  const room = (columns) => clamp(Math.min(innerWidth - 32, 1320) / columns - 60, 280, 560);
  const columns = (most) => clamp(Math.floor(innerWidth / 400), 1, most);

  const scatter = (task, cost) => {
    const [costName, costText] = COSTS[cost];
    const rows = task.rows.filter((r) => r.mean !== null && r[cost] > 0);
    if (!rows.length) return null;
    const [width, height, left, bottom, topPad] = [room(columns(2)), 340, 58, 52, 34];
    const costs = rows.map((r) => r[cost]), scores = rows.flatMap((r) => [r.mean - (r.spread ?? 0), r.mean + (r.spread ?? 0)]);
    const [x0, x1] = [Math.min(...costs) / 1.25, Math.max(...costs) * 1.6];
    let [y0, y1] = [Math.min(...scores), Math.max(...scores)];
    const pad = 0.1 * (y1 - y0) || Math.abs(y1) * 0.05 || 1;
    [y0, y1] = [y0 - pad, y1 + pad];
    const x = (v) => left + (width - left - 8) * Math.log(v / x0) / Math.log(x1 / x0);
    const y = (v) => {
      const share = (v - y0) / (y1 - y0);
      return topPad + (height - bottom - topPad) * (task.higher ? 1 - share : share);
    };
    const chart = axes({
      title: `${task.title}: ${task.metric} against ${costName}`, x, y, width, height, left, bottom,
      xTicks: niceLog(x0, x1), yTicks: niceLinear(y0, y1), xText: costText, yText: (v) => String(v), xName: costName, yName: task.metric,
    });
    const better = (a, b) => (task.higher ? a > b : a < b);
    const front = [...rows].sort((a, b) => a[cost] - b[cost]).filter((r, i, all) => all.slice(0, i).every((o) => better(r.mean, o.mean)));
    if (front.length > 1) chart.append(svg("path", { class: "front", d: `M${front.map((r) => `${x(r[cost])} ${y(r.mean)}`).join("L")}` }));
    const taken = rows.map((r) => [x(r[cost]) - 7, y(r.mean) - 7, x(r[cost]) + 7, y(r.mean) + 7]);
    const marks = [];
    for (const r of rows) {
      const g = svg("g", { class: `mark ${ink(r.label)}`, stroke: "none" }), [cx, cy] = [x(r[cost]), y(r.mean)];
      if (r.spread) g.append(svg("line", { class: "spread", x1: cx, x2: cx, y1: y(r.mean - r.spread), y2: y(r.mean + r.spread) }));
      g.append(svg("circle", { class: "dot", cx, cy, r: 6 }));
      const w = 6.4 * r.id.length, spots = [[cx + 10, cy + 4], [cx - 10 - w, cy + 4], [cx - w / 2, cy - 12], [cx - w / 2, cy + 21], [cx + 10, cy - 9], [cx + 10, cy + 17]];
      const box = ([a, b]) => [a, b - 11, a + w, b + 3];
      const free = (s) => s[0] >= left && s[2] <= width && s[1] > 16 && s[3] < height - bottom + 6 && taken.every((t) => s[2] < t[0] || s[0] > t[2] || s[3] < t[1] || s[1] > t[3]);
      const spot = spots.find((s) => free(box(s)));
      if (spot) {
        taken.push(box(spot));
        g.append(svg("text", { class: "name", x: spot[0], y: spot[1] }, r.id));
      }
      const text = `${r.label}\n${task.metric} ${short(r.mean, 4)}${r.spread === null ? "" : ` ± ${short(r.spread)}`}\n${costName} ${costText(r[cost])}`;
      g.addEventListener("pointermove", (event) => { showTip(event, text); marks.forEach((m) => m.classList.toggle("faint", m !== g)); });
      g.addEventListener("pointerleave", () => { hideTip(); marks.forEach((m) => m.classList.remove("faint")); });
      marks.push(g);
    }
    chart.append(...marks);
    return make("figure", { className: "chart" }, make("h3", {}, task.title[0].toUpperCase() + task.title.slice(1), make("span", { textContent: task.name })), chart);
  };

  const costs = () => {
    if (!data.tasks.length) return;
    let now = "step_ms";
    const draw = () => {
      $("costs").replaceChildren(...Object.entries(COSTS).map(([key, [text]]) => make("button", { type: "button", textContent: text, ariaPressed: String(key === now), onclick: () => { now = key; draw(); } })));
      $("scatters").replaceChildren(...data.tasks.map((t) => scatter(t, now)).filter(Boolean));
    };
    draw();
    redraw.push(draw);
    $("cost").hidden = !$("scatters").children.length;
  };

  const curves = () => {
    const points = data.bench.points;
    if (!points.length) return;
    const names = [...new Set(points.map((p) => p.entrant))], off = new Set();
    const written = (n) => ["sdpa", "naive", "flex"].includes(n); // baselines written out in plain torch
    const kinds = [["best", "time a call", time], ["peak_bytes", "peak memory beyond the input", (v) => `${metricPrefix(v)}B`], ["flops", "FLOPs a call", metricPrefix]];
    const draw = () => {
      $("legend").replaceChildren(...names.map((n) => make("button", {
        type: "button", ariaPressed: String(!off.has(n)), onclick: () => { if (!off.delete(n)) off.add(n); draw(); },
      }, make("i", { className: `ink ${ink(n)}${written(n) ? " ring" : ""}` }), n)));
      $("curves").replaceChildren(...kinds.map(([key, title, text]) => {
        const seen = points.filter((p) => p.status === "ok" && p[key] > 0 && !off.has(p.entrant));
        if (!seen.length) return null;
        const [width, height, left, bottom, topPad] = [room(columns(3)), 360, 66, 52, 30];
        const ends = (values, slack) => [Math.min(...values) / slack, Math.max(...values) * slack];
        const [x0, x1] = ends(seen.map((p) => p.length), 1.1), [y0, y1] = ends(seen.map((p) => p[key]), 1.3);
        const x = (v) => left + (width - left - 12) * Math.log(v / x0) / Math.log(x1 / x0);
        const y = (v) => height - bottom - (height - bottom - topPad) * Math.log(v / y0) / Math.log(y1 / y0);
        const lengths = [...new Set(seen.map((p) => p.length))].sort((a, b) => a - b);
        const chart = axes({
          title, x, y, width, height, left, bottom, xTicks: lengths, yTicks: niceLog(y0, y1), xText: (v) => (v % 1024 ? String(v) : `${v / 1024}k`), yText: text, xName: "tokens", yName: "",
        });
        const marks = [];
        for (const n of names.filter((n) => !off.has(n))) {
          const own = seen.filter((p) => p.entrant === n).sort((a, b) => a.length - b.length);
          const g = svg("g", { class: `mark ${ink(n)}`, stroke: "none" });
          g.append(svg("path", { class: written(n) ? "curve dashed" : "curve", d: own.length ? `M${own.map((p) => `${x(p.length)} ${y(p[key])}`).join("L")}` : "" }));
          for (const p of own) {
            const dot = svg("circle", { class: "dot", cx: x(p.length), cy: y(p[key]), r: 5 });
            dot.addEventListener("pointermove", (event) => { showTip(event, `${n}\n${p.length} tokens: ${text(p[key])}`); marks.forEach((m) => m.classList.toggle("faint", m !== g)); });
            dot.addEventListener("pointerleave", () => { hideTip(); marks.forEach((m) => m.classList.remove("faint")); });
            g.append(dot);
          }
          marks.push(g);
        }
        chart.append(...marks);
        return make("figure", { className: "chart" }, make("h3", { textContent: title[0].toUpperCase() + title.slice(1) }), chart);
      }).filter(Boolean));
    };
    draw();
    redraw.push(draw);
  };

  const redraw = [];
  let drawn = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== drawn) redraw.forEach((draw) => draw()); // phones also resize as their bars come and go
    drawn = innerWidth;
  });
  costs();
  curves();
  looks();
})();
