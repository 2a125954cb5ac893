"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  // Arms: shown or hidden in every figure, by any of the legends.
  const show = (arm, shown) => {
    for (const button of all(`.legend [data-arm="${arm}"]`)) button.setAttribute("aria-pressed", String(shown));
    for (const part of all(`.arm-${arm}`)) part.style.display = shown ? "" : "none";
  };
  for (const button of all(".legend [data-arm]")) {
    button.addEventListener("click", () => show(button.dataset.arm, button.getAttribute("aria-pressed") !== "true"));
  }
  for (const button of all(".legend [data-all]")) {
    button.addEventListener("click", () => {
      for (const other of all("[data-arm]", button.parentElement)) show(other.dataset.arm, button.dataset.all === "true");
    });
  }

  // Samples: one seed at a time, tokens coloured by one measure.
  const choice = document.querySelector(".seed select");
  const choose = () => {
    for (const one of all(".prompt")) one.hidden = choice !== null && one.dataset.seed !== choice.value;
  };
  choice?.addEventListener("change", choose);
  choose();

  const say = (x) => (x === 0 ? "0" : Math.abs(x) < 0.001 ? x.toExponential(1) : String(Number(x.toPrecision(3)))).replaceAll("-", "−");
  const scale = document.querySelector(".scale");
  const paint = (measure) => {
    const most = data.scale[measure] || 0;
    let negative = false;
    for (const group of all(".tokens")) {
      const values = (measure && data.numbers[group.dataset.at][measure]) || [];
      all("span", group).forEach((token, t) => {
        const x = values[t] ?? 0;
        negative ||= x < -most / 1000; // an exact KL is below 0 by rounding alone
        const share = most ? Math.round(55 * Math.sqrt(Math.min(1, Math.abs(x) / most))) : 0;
        const colour = x < 0 ? "--less" : "--more";
        token.style.backgroundColor = share ? `color-mix(in srgb, var(${colour}) ${share}%, var(--ground))` : "";
      });
    }
    scale.hidden = !most;
    scale.querySelector(".bar").classList.toggle("one", !negative);
    scale.querySelector(".less").textContent = negative ? `≤ ${say(-most)}` : "0";
    scale.querySelector(".more").textContent = `≥ ${say(most)}`;
  };
  for (const radio of all("input[name=measure]")) radio.addEventListener("change", () => paint(radio.value));
  const chosen = document.querySelector("input[name=measure]:checked");
  if (chosen) paint(chosen.value);

  // The numbers of a token: by pointer, by tap, or by Tab and the arrow keys.
  const tip = document.getElementById("tip");
  const hide = () => { if (tip) tip.hidden = true; };
  const tell = (token) => {
    const group = token.closest(".tokens");
    const values = data.numbers[group.dataset.at];
    const t = all("span", group).indexOf(token);
    const lines = Object.keys(values).filter((key) => values[key][t] !== undefined);
    if (!lines.length) return;
    tip.textContent = [`token ${t + 1}: ${token.classList.contains("part") ? "part of what follows" : token.textContent.trim() || "white space"}`,
      ...lines.map((key) => `${data.names[key] ?? key}: ${say(values[key][t])}`)].join("\n");
    tip.hidden = false;
    const box = token.getBoundingClientRect();
    const room = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(box.left, room - tip.offsetWidth - 8));
    const below = box.bottom + 6 + tip.offsetHeight < window.innerHeight || box.top < tip.offsetHeight + 6;
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${(below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + window.scrollY}px`;
  };
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  for (const group of all(".tokens")) {
    const tokens = all("span", group);
    tokens.forEach((token, t) => { token.tabIndex = t === 0 ? 0 : -1; });
    const focus = (token) => {
      for (const other of tokens) other.tabIndex = other === token ? 0 : -1;
      token.focus();
    };
    group.addEventListener("keydown", (event) => {
      const t = tokens.indexOf(document.activeElement);
      if (event.key === "Escape") return hide();
      if (t < 0 || !(event.key in step)) return;
      event.preventDefault();
      focus(tokens[Math.max(0, Math.min(tokens.length - 1, t + step[event.key]))]);
    });
    group.addEventListener("click", (event) => { if (tokens.includes(event.target)) { focus(event.target); tell(event.target); } });
    group.addEventListener("focusin", (event) => { if (tokens.includes(event.target)) tell(event.target); });
    group.addEventListener("focusout", hide);
    group.addEventListener("mouseover", (event) => { if (tokens.includes(event.target)) tell(event.target); });
    group.addEventListener("mouseleave", hide);
    group.addEventListener("scroll", () => (tokens.includes(document.activeElement) ? tell(document.activeElement) : hide()));
  }
})();
