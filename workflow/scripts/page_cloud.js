// The sample that the gallery shows as points in space. Needs THREE (workflow/assets/three) and page.js.
"use strict";

(() => {
  const box = document.getElementById("cloud");
  let renderer;
  try {
    renderer = new THREE.WebGLRenderer({ antialias: true });
  } catch {
    box.textContent = "This browser draws no 3D (WebGL is off). The clouds are also in Fig. 6, below.";
    return;
  }
  const scene = new THREE.Scene();
  const eye = new THREE.PerspectiveCamera(42, 1.45, 0.05, 100);
  renderer.setClearColor(0x20262e);
  renderer.setPixelRatio(Math.min(2, window.devicePixelRatio));
  box.append(renderer.domElement);

  const controls = new THREE.OrbitControls(eye, renderer.domElement);
  // A wheel over the cloud scrolls the page until the cloud has been chosen; so does a finger that moves up or down.
  controls.enableZoom = false;
  controls.enablePan = false;
  renderer.domElement.style.touchAction = "pan-y";

  const material = new THREE.ShaderMaterial({
    uniforms: { paint: { value: null }, height: { value: 1 } },
    // A point covers what its pixel saw, and a little more, so that walls close up.
    vertexShader: `attribute float reach; attribute vec2 place; varying vec2 at; uniform float height;
      void main() { at = place; vec4 seen = modelViewMatrix * vec4(position, 1.0); gl_Position = projectionMatrix * seen;
        gl_PointSize = max(1.5, 1.25 * reach * projectionMatrix[1][1] * height / (2.0 * gl_Position.w)); }`,
    fragmentShader: `uniform sampler2D paint; varying vec2 at; void main() { gl_FragColor = vec4(texture2D(paint, at).rgb, 1.0); }`,
  });
  const geometry = new THREE.BufferGeometry();
  const points = new THREE.Points(geometry, material);
  points.frustumCulled = false;
  scene.add(points);
  const textures = Object.fromEntries(["image", "depth", "normals"].map((kind) => {
    const texture = new THREE.CanvasTexture(document.getElementById(kind));
    Object.assign(texture, { magFilter: THREE.NearestFilter, minFilter: THREE.NearestFilter, generateMipmaps: false, colorSpace: THREE.NoColorSpace });
    return [kind, texture];
  }));

  let asked = false;
  function draw() {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      renderer.render(scene, eye);
      box.dataset.drawn = Number(box.dataset.drawn ?? 0) + 1;
    });
  }

  let middle = 3;
  function reset() {
    controls.target.set(0, -0.1 * middle, -middle);
    eye.position.set(0.6 * middle, 0.45 * middle, 0.8 * middle);
    controls.update();
    draw();
  }

  function place({ depth, size, seed }) {
    const { focal, centre } = camera(size);
    const position = new Float32Array(3 * size * size), reach = new Float32Array(size * size), at = new Float32Array(2 * size * size);
    for (let i = 0; i < size * size; i++) {
      const u = i % size, v = Math.floor(i / size), z = depth[i];
      position.set([((u + 0.5 - centre) / focal) * z, (-(v + 0.5 - centre) / focal) * z, -z], 3 * i);
      at.set([(u + 0.5) / size, 1 - (v + 0.5) / size], 2 * i);
      reach[i] = z / focal;
    }
    geometry.setAttribute("position", new THREE.BufferAttribute(position, 3));
    geometry.setAttribute("place", new THREE.BufferAttribute(at, 2));
    geometry.setAttribute("reach", new THREE.BufferAttribute(reach, 1));
    Object.values(textures).forEach((texture) => { texture.needsUpdate = true; });
    // Another seed is another room; the same seed under other guidance keeps the view, so that a flip shows what moved.
    if (box.dataset.seed !== String(seed)) {
      box.dataset.seed = seed;
      middle = depth.slice().sort()[Math.floor(depth.length / 2)];
      reset();
    }
    draw();
  }

  function turn(across, up) {
    const offset = eye.position.clone().sub(controls.target), length = offset.length();
    const angle = Math.atan2(offset.x, offset.z) + across;
    const tilt = Math.min(1.5, Math.max(-1.5, Math.asin(offset.y / length) + up));
    offset.set(Math.sin(angle) * Math.cos(tilt), Math.sin(tilt), Math.cos(angle) * Math.cos(tilt)).multiplyScalar(length);
    eye.position.copy(controls.target).add(offset);
    controls.update();
    draw();
  }

  function zoom(by) {
    const offset = eye.position.clone().sub(controls.target);
    offset.setLength(Math.min(4 * middle, Math.max(0.2 * middle, offset.length() * by)));
    eye.position.copy(controls.target).add(offset);
    controls.update();
    draw();
  }

  const keys = {
    ArrowLeft: () => turn(-0.15, 0), ArrowRight: () => turn(0.15, 0), ArrowUp: () => turn(0, 0.12), ArrowDown: () => turn(0, -0.12),
    "+": () => zoom(0.85), "=": () => zoom(0.85), "-": () => zoom(1.18), 0: reset,
  };
  box.addEventListener("keydown", (event) => {
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    keys[event.key]();
    event.preventDefault();
  });
  box.addEventListener("wheel", (event) => {
    if (document.activeElement !== box) return;
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.1 : 0.9);
  }, { passive: false });
  box.addEventListener("pointerdown", () => box.focus({ preventScroll: true }));
  document.getElementById("nearer").addEventListener("click", () => zoom(0.85));
  document.getElementById("farther").addEventListener("click", () => zoom(1.18));
  document.getElementById("reset").addEventListener("click", reset);
  const chooser = document.getElementById("paint");
  chooser.addEventListener("change", () => { material.uniforms.paint.value = textures[chooser.value]; draw(); });
  material.uniforms.paint.value = textures.image;
  controls.addEventListener("change", draw);
  new ResizeObserver(() => {
    const { clientWidth: width, clientHeight: height } = box;
    if (!width || !height) return;
    renderer.setSize(width, height, false);
    material.uniforms.height.value = height * renderer.getPixelRatio();
    eye.aspect = width / height;
    eye.updateProjectionMatrix();
    draw();
  }).observe(box);

  listeners.push(place);
  if (shown) place(shown);
})();
