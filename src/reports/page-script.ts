/**
 * The page's script: a cursor over each chart that follows the pointer or the arrow keys and lists the values of the
 * nearest step. It reads the JSON beside the picture: per series, points of [step, x, y, value].
 */
export const pageScript = `
for (const figure of document.querySelectorAll('figure.chart')) {
  const { plot: [left, top, right, bottom], series } = JSON.parse(figure.querySelector('script').textContent);
  const svg = figure.querySelector('svg');
  const cursor = svg.querySelector('.cursor');
  const columns = [...new Set(series.flatMap((each) => each.points.map((point) => point[1])))].sort((a, b) => a - b);
  let at = -1;
  let tip;
  const shape = (name, attributes) => {
    const node = document.createElementNS('http://www.w3.org/2000/svg', name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    cursor.append(node);
  };
  const clear = () => { cursor.replaceChildren(); tip?.remove(); tip = undefined; at = -1; };
  const nearest = (points, x) => {
    let low = 0, high = points.length - 1;
    while (high - low > 1) { const middle = (low + high) >> 1; if (points[middle][1] < x) low = middle; else high = middle; }
    return Math.abs(points[low][1] - x) <= Math.abs(points[high][1] - x) ? points[low] : points[high];
  };
  const show = (index) => {
    at = Math.max(0, Math.min(columns.length - 1, index));
    const x = columns[at];
    cursor.replaceChildren();
    tip ??= figure.appendChild(Object.assign(document.createElement('div'), { className: 'tip' }));
    tip.replaceChildren();
    shape('line', { x1: x, x2: x, y1: top, y2: bottom });
    let step;
    series.forEach((each, order) => {
      const point = nearest(each.points, x);
      if (Math.abs(point[1] - x) > 0.011) return;
      step = point[0];
      shape('circle', { cx: point[1], cy: point[2], r: 4, class: 'dot s' + order });
      const row = document.createElement('div');
      const key = Object.assign(document.createElement('i'), { className: 'key s' + order });
      const value = Object.assign(document.createElement('span'), { textContent: point[3] });
      row.append(key, each.label, value);
      tip.append(row);
    });
    tip.prepend(Object.assign(document.createElement('b'), { textContent: 'Step ' + step }));
    const box = svg.getBoundingClientRect();
    const frame = figure.getBoundingClientRect();
    const pixel = box.left - frame.left + (x / svg.viewBox.baseVal.width) * box.width;
    const space = frame.width - pixel > tip.offsetWidth + 20;
    tip.style.left = (space ? pixel + 12 : Math.max(4, pixel - 12 - tip.offsetWidth)) + 'px';
    tip.style.top = box.top - frame.top + 8 + 'px';
  };
  const closest = (x) => {
    let best = 0;
    columns.forEach((column, index) => { if (Math.abs(column - x) < Math.abs(columns[best] - x)) best = index; });
    return best;
  };
  svg.addEventListener('pointermove', (event) => {
    const box = svg.getBoundingClientRect();
    show(closest(((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width));
  });
  svg.addEventListener('pointerleave', clear);
  svg.addEventListener('blur', clear);
  svg.addEventListener('keydown', (event) => {
    const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: columns.length - 1 };
    if (event.key === 'Escape') clear();
    else if (event.key in moves) { event.preventDefault(); show(moves[event.key]); }
  });
}
`;
